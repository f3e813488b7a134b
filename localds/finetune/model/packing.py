"""Where the tokens of a batch stand: several examples in a row, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from localds.ops.mlx.cache import Turns


class Batch(Protocol):
    """Packed examples, arrays [rows, length].

    `targets` are the ids to predict, each of which counts by its weight. `segments` are 0 for
    padding, then the number of the example in its row; `positions` begin at 0 in each.
    """

    @property
    def ids(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def targets(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def weights(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def segments(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def positions(self) -> NDArray[np.int32]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Packing:
    """`segments` and `positions` int32 [rows, length]."""

    segments: mx.array
    positions: mx.array

    def rotate(self, x: mx.array, turns: Turns) -> mx.array:
        """Turn the pairs (2i, 2i + 1) of x [rows, heads, length, 2 * pairs]."""
        cosine, sine = turns.table[:, self.positions[:, None]]
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = mx.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
        return turned.reshape(x.shape)

    @property
    def real(self) -> mx.array:
        """1 for tokens, 0 for padding, float32 [rows, length]."""
        return (self.segments > 0).astype(mx.float32)

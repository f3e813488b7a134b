"""Rows of examples as the arrays that a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from localds.finetune.data.examples import Encoded, Examples

WIDTH_STEP: Final = 64
"""Widths of batches are multiples of this, so that few shapes occur."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows with several examples each, the segments; all arrays are [rows, width].

    `ids` int32; `targets` int32, the id that follows, 0 where its weight is 0; `weights` float32,
    1 where predicting the target counts; `segments` int32, the number of the example in its row
    from 1, 0 in padding; `positions` int32, from 0 in each segment. An example's last token is a
    target only.
    """

    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]

    @property
    def trained_tokens(self) -> int:
        """Targets that count."""
        return int(np.count_nonzero(self.weights))

    @property
    def tokens(self) -> int:
        """Positions that are no padding."""
        return int(np.count_nonzero(self.segments))


def build_batch(examples: Examples, rows: Sequence[Sequence[int]], width: int) -> Batch:
    """Lay out `rows`, each the indices of its examples, in a batch of `width`."""
    shape = (len(rows), width)
    ids, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    batch = Batch(ids, targets, np.zeros(shape, np.float32), segments, positions)
    for row, indices in enumerate(rows):
        at = 0
        for number, index in enumerate(indices, start=1):
            at = _place(batch, row, at, number, examples[index])
    return batch


def _place(batch: Batch, row: int, at: int, number: int, example: Encoded) -> int:
    """Write one example into a row from `at` on; returns where it ends."""
    size = len(example) - 1
    there = (row, slice(at, at + size))
    trained = example.trained[1:]
    batch.ids[there] = example.ids[:-1]
    batch.targets[there] = np.where(trained, example.ids[1:], 0)
    batch.weights[there] = trained
    batch.segments[there] = number
    batch.positions[there] = np.arange(size)
    return at + size


def width_for(used: int, length: int) -> int:
    """A width for rows of which `used` positions are filled: `length`, or halved while it fits."""
    width = length
    while width % (2 * WIDTH_STEP) == 0 and used <= width // 2:
        width //= 2
    return width


def padded(used: int, length: int) -> int:
    """`used` rounded up to a multiple of `WIDTH_STEP`, at most `length`."""
    return min(-(-used // WIDTH_STEP) * WIDTH_STEP, length)

"""Low-rank adapters beside frozen matrices: LoRA, rsLoRA, DoRA; for one matrix or for a stack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from localds.finetune.model.gradients import differentiable
from localds.finetune.model.matrices import gathered

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.finetune.model.frozen import Frozen, FrozenStack

Parameters = dict[str, dict[str, mx.array]]
"""What is trained, float32, by the name of the tensor without ".weight".

Of each: "a" [rank, columns] and "b" [rows, rank], with DoRA also "m" [rows], the lengths of rows;
of experts with their number in front.
"""


class Trained(NamedTuple):
    """The parameters, and what drops out: keys uint32 [adapters, 2], None for nothing."""

    parameters: Parameters
    dropout: mx.array | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is added to the tensor `name`: scale * B A, of shapes [..., rows, columns].

    `number` counts the adapters of the model. `squares` float32 [..., rows] are the squared lengths
    of the frozen rows, for DoRA alone.
    """

    name: str
    number: int
    shape: tuple[int, ...]
    rank: int
    scale: float
    dropout: float
    squares: mx.array | None

    def init(self, seed: int) -> dict[str, mx.array]:
        """A from a uniform distribution, B zero: the model computes as without it."""
        *stack, rows, columns = self.shape
        bound = 1 / math.sqrt(columns)  # Kaiming's with a = sqrt(5)
        random = np.random.default_rng((seed, self.number))
        a = random.random((*stack, self.rank, columns), np.float32) * (2 * bound) - bound
        values = {"a": mx.array(a), "b": mx.zeros((*stack, rows, self.rank))}
        if self.squares is not None:
            values["m"] = mx.sqrt(self.squares)
        return values

    def dropped(self, x: mx.array, keys: mx.array | None) -> mx.array:
        """X with a share of its values 0, and the others larger by as much."""
        if keys is None or self.dropout == 0:
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=keys[self.number])
        return mx.where(kept, x / (1 - self.dropout), 0)

    def drops(self, keys: mx.array | None) -> bool:
        """Whether `dropped` changes anything."""
        return keys is not None and self.dropout > 0

    def gain(self, p: dict[str, mx.array], frozen_a: mx.array) -> mx.array:
        """DoRA's factor of each row [..., rows]: m over the row's length in W + scale * B A.

        `frozen_a` [..., rank, rows] is A times the transpose of W. The length counts as constant,
        as in arXiv:2402.09353, 4.3.
        """
        assert self.squares is not None  # noqa: S101  asked of DoRA alone
        a, b = mx.stop_gradient(p["a"]), mx.stop_gradient(p["b"])
        crossed = (frozen_a.swapaxes(-1, -2) * b).sum(axis=-1)
        added = ((b @ (a @ a.swapaxes(-1, -2))) * b).sum(axis=-1)
        squares = self.squares + 2 * self.scale * crossed + self.scale**2 * added
        return p["m"] / mx.sqrt(mx.maximum(squares, 1e-30))


@dataclass(frozen=True, slots=True)
class Linear:
    """A frozen matrix, and perhaps an adapter."""

    frozen: Frozen
    adapter: Adapter | None

    def __call__(self, x: mx.array, trained: Trained) -> mx.array:
        """X [n, columns] to [n, rows]."""
        if self.adapter is None:
            return self.frozen(x)
        p = trained.parameters[self.adapter.name]
        gain = None
        if self.adapter.squares is not None:
            gain = self.adapter.gain(p, self.frozen(mx.stop_gradient(p["a"])))

        def low_rank(x: mx.array) -> mx.array:
            return x @ p["a"].T @ p["b"].T

        return _adapted(self.adapter, x, self.frozen, low_rank, gain, trained.dropout)


@dataclass(frozen=True, slots=True)
class StackedLinear:
    """A frozen stack of matrices, and perhaps an adapter for each."""

    frozen: FrozenStack
    adapter: Adapter | None

    def __call__(self, x: mx.array, ids: mx.array, trained: Trained) -> mx.array:
        """Each row of x [m, columns] by the matrix in ids [m], ascending: [m, rows]."""

        def frozen(x: mx.array) -> mx.array:
            return self.frozen(x, ids)

        if self.adapter is None:
            return frozen(x)
        p = trained.parameters[self.adapter.name]
        gain = None
        if self.adapter.squares is not None:
            frozen_a = self.frozen.times_all(mx.stop_gradient(p["a"]))
            gain = _chosen_rows(self.adapter.gain(p, frozen_a), ids)

        def low_rank(x: mx.array) -> mx.array:
            inner = gathered(x, p["a"].swapaxes(-1, -2), ids)
            return gathered(inner, p["b"].swapaxes(-1, -2), ids)

        return _adapted(self.adapter, x, frozen, low_rank, gain, trained.dropout)


def _adapted(
    adapter: Adapter,
    x: mx.array,
    frozen: Callable[[mx.array], mx.array],
    low_rank: Callable[[mx.array], mx.array],
    gain: mx.array | None,
    keys: mx.array | None,
) -> mx.array:
    """The map with its adapter. Where DoRA drops out, it does so for its share of W as well."""
    dropped = adapter.dropped(x, keys)
    added = adapter.scale * low_rank(dropped)
    if gain is None:
        return frozen(x) + added
    if not adapter.drops(keys):
        return gain * (frozen(x) + added)
    return frozen(x) + (gain - 1) * frozen(dropped) + gain * added


def _chosen_rows(table: mx.array, ids: mx.array) -> mx.array:
    """Table [n, width] at ids [m]. MLX's gradient would add in any order, this one does not."""

    def gradient(dy: mx.array) -> mx.array:
        return (mx.arange(len(table))[:, None] == ids).astype(mx.float32) @ dy

    return differentiable(table, lambda table: table[ids], gradient)

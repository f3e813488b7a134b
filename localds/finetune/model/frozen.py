"""Frozen linear maps: with a gradient of their input, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from localds.finetune.model.gradients import differentiable
from localds.finetune.model.matrices import (
    chosen_times,
    chosen_transposed,
    product,
    row_squares,
    times,
    transposed,
    written,
)

if TYPE_CHECKING:
    from localds.ops.mlx.matrix import Matrix


class Frozen(Protocol):
    """A matrix [rows, columns]."""

    def __call__(self, x: mx.array) -> mx.array:
        """X [n, columns] @ transpose: [n, rows], differentiable in x."""
        ...

    def row_squares(self) -> mx.array:
        """The squared length of each row, float32 [rows]."""
        ...


@dataclass(frozen=True, slots=True)
class FrozenMatrix:
    """A matrix as the device keeps it."""

    matrix: Matrix

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        return differentiable(
            x, lambda x: times(self.matrix, x), lambda dy: transposed(self.matrix, dy)
        )

    def row_squares(self) -> mx.array:  # noqa: D102
        return row_squares(self.matrix)


@dataclass(frozen=True, slots=True)
class FrozenHeads:
    """Latents to keys and values: the rows of each head are its keys' (nope), then its values'.

    `keys` is a stack [heads, kv_rank, nope], `values` a matrix [heads * value, kv_rank].
    """

    keys: Matrix
    values: Matrix
    heads: int

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        return differentiable(x, self._times, self._transposed)

    def _times(self, x: mx.array) -> mx.array:
        keys = product(x, self._key_columns())
        return self._joined(keys, times(self.values, x))

    def _transposed(self, dy: mx.array) -> mx.array:
        by_head = dy.reshape(len(dy), self.heads, -1)
        columns = self._key_columns()
        nope = columns.shape[1] // self.heads
        keys = by_head[..., :nope].reshape(len(dy), -1)
        values = by_head[..., nope:].reshape(len(dy), -1)
        return product(keys, columns.swapaxes(0, 1)) + transposed(self.values, values)

    def row_squares(self) -> mx.array:  # noqa: D102
        columns = self._key_columns().astype(mx.float32)
        keys = (columns * columns).sum(axis=0, keepdims=True)
        return self._joined(keys, row_squares(self.values)[None])[0]

    def _key_columns(self) -> mx.array:
        """All heads' keys [kv_rank, heads * nope], written out: they are small."""
        keys = written(self.keys)
        return keys.swapaxes(0, 1).reshape(keys.shape[1], -1)

    def _joined(self, keys: mx.array, values: mx.array) -> mx.array:
        parts = [part.reshape(len(part), self.heads, -1) for part in (keys, values)]
        return mx.concatenate(parts, axis=-1).reshape(len(keys), -1)


@dataclass(frozen=True, slots=True)
class FrozenStack:
    """A stack of matrices [n, rows, columns]."""

    stack: Matrix

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """Each row of x [m, columns] by the matrix in ids [m], ascending; differentiable in x."""
        return differentiable(
            x,
            lambda x: chosen_times(self.stack, x, ids),
            lambda dy: chosen_transposed(self.stack, dy, ids),
        )

    def times_all(self, x: mx.array) -> mx.array:
        """X [n, m, columns] by the matrix of its number: [n, m, rows]; not differentiable."""
        ids = mx.repeat(mx.arange(len(x), dtype=mx.uint32), x.shape[1])
        found = chosen_times(self.stack, x.reshape(-1, x.shape[-1]), ids)
        return found.reshape(*x.shape[:2], -1)

    def row_squares(self) -> mx.array:
        """The squared length of each row, float32 [n, rows]."""
        return row_squares(self.stack)

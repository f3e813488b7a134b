"""Matrices on a Mac's GPU that MLX has no form for: the blocks of the file.

A few rows are multiplied by a kernel that reads the blocks, in float32. Many rows pay for writing
the matrix out in float16 first, for MLX's matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.feed_forward import SORTED_FROM
from localds.ops.mlx.kept import counted
from localds.ops.mlx.metal.source import SIMDGROUP, launch
from localds.ops.mlx.repack import replaced
from localds.ops.mlx.written import chosen_product, product

if TYPE_CHECKING:
    from localds.gguf import GGMLType

FEW = 8
"""Rows of x for each matrix that are multiplied without writing it out."""

FEWER_TOGETHER, MORE_TOGETHER = 2, 4
"""Rows of a matrix that a simdgroup does."""

_SIMDGROUPS = 4  # of a threadgroup
_MANY_ROWS = 4096
_UNITS = 128  # of 32 values, written out by a threadgroup


@dataclass(frozen=True, slots=True)
class MetalMatrix:
    """Blocks uint8 [rows, bytes], or of a stack [matrices, rows, bytes]."""

    kind: GGMLType
    blocks: mx.array

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        n = x.shape[-2]
        if n > FEW:
            return product(x, self.blocks, self.written, itemsize=2)
        matrices = len(self.blocks) if self.blocks.ndim == 3 else 1
        ids = counted(matrices, n)
        return self.multiplied(x.reshape(-1, x.shape[-1]), ids).reshape(*x.shape[:-1], -1)

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:  # noqa: D102
        return residual + self(x)

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:  # noqa: D102
        if len(ids) < SORTED_FROM or len(ids) <= FEW * len(self.blocks):
            return self.multiplied(x, ids)
        return chosen_product(x, self.blocks, ids, self.written, itemsize=2)

    def lookup(self, ids: mx.array) -> mx.array:  # noqa: D102
        return self.converted(self.blocks[ids], mx.float32)

    def put(self, index: int, one: MetalMatrix) -> MetalMatrix:  # noqa: D102
        return MetalMatrix(self.kind, replaced(self.blocks, index, one.blocks))

    def arrays(self) -> list[mx.array]:  # noqa: D102
        return [self.blocks]

    def multiplied(self, x: mx.array, ids: mx.array) -> mx.array:
        """Each row of x [m, columns] times the matrix of the stack in ids uint32 [m]."""
        blocks = self.blocks.reshape(-1, *self.blocks.shape[-2:])
        together = FEWER_TOGETHER if blocks.shape[1] < _MANY_ROWS else MORE_TOGETHER
        return multiply(self.kind, blocks, x, ids, together)

    def written(self, blocks: mx.array) -> mx.array:
        """Blocks in float16."""
        return self.converted(blocks, mx.float16)

    def converted(self, blocks: mx.array, dtype: mx.Dtype) -> mx.array:
        """The values [..., columns] of `blocks` uint8 [..., bytes], as float16 or float32."""
        flat = blocks.reshape(-1, blocks.shape[-1])
        columns = flat.shape[1] // self.kind.block_bytes * self.kind.block_elements
        written = launch(
            "convert",
            [flat],
            [((len(flat), columns), dtype)],
            groups=(-(-len(flat) * columns // (32 * _UNITS)), 1),
            threads=_UNITS,
            kind=self.kind,
            T=dtype,
        )[0]
        return written.reshape(*blocks.shape[:-1], columns)


def multiply(
    kind: GGMLType, blocks: mx.array, x: mx.array, ids: mx.array, together: int
) -> mx.array:
    """Each row of x [m, columns] times the matrix of `blocks` [matrices, rows, bytes] in ids [m].

    A simdgroup does `together` rows.
    """
    rows = blocks.shape[1]
    return launch(
        "multiply",
        [blocks, x, ids],
        [((len(ids), rows), mx.float32)],
        groups=(-(-rows // (_SIMDGROUPS * together)), len(ids)),
        threads=_SIMDGROUPS * SIMDGROUP,
        kind=kind,
        kRows=together,
    )[0]

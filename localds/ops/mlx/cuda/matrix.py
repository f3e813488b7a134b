"""Matrices on an NVIDIA GPU: the blocks of the file, in the order of the file.

A few rows are multiplied by a kernel that reads the blocks, in float32. Many rows pay for writing
the matrix out in float16 first, for the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.cuda.source import WARP, launch
from localds.ops.mlx.feed_forward import SORTED_FROM, Gated
from localds.ops.mlx.matrix import PLAIN
from localds.ops.mlx.repack import replaced

if TYPE_CHECKING:
    from collections.abc import Callable


FEW = 8
"""Rows of x that are multiplied without writing the matrix out."""

WARPS = 4
"""Warps of a block."""
MANY_ROWS = 4096


@dataclass(frozen=True, slots=True)
class CudaMatrix:
    """Blocks uint8 [matrices, rows, bytes]; `stacked` where a stack was asked for.

    Plain floats count as blocks of 32.
    """

    kind: GGMLType
    blocks: mx.array
    stacked: bool

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        n = x.shape[-2]
        if n > FEW:
            weight = self._written().swapaxes(-1, -2)
            return _product(x, weight if self.stacked else weight[0], mx.matmul)
        lead = x.shape[:-1]
        ids = counted(len(self.blocks), n) if self.stacked else zeros(n)[:, 0]
        return self.multiplied(x.reshape(-1, x.shape[-1]), ids).reshape(*lead, -1)

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:  # noqa: D102
        n = len(x)
        if n > FEW:
            return residual + self(x)
        return self.combined(residual, x, zeros(n), ones(n))

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:  # noqa: D102
        if len(ids) < SORTED_FROM:
            return self.multiplied(x, ids)

        def gathered(x: mx.array, weight: mx.array) -> mx.array:
            # With an axis put in by indexing, MLX takes the rows of x from the wrong places.
            rows = mx.contiguous(x).reshape(len(ids), 1, -1)
            return mx.gather_mm(rows, weight, rhs_indices=ids, sorted_indices=True)[:, 0]

        return _product(x, self._written().swapaxes(-1, -2), gathered)

    def lookup(self, ids: mx.array) -> mx.array:  # noqa: D102
        return self._converted(self.blocks[0][ids], mx.float32)

    def put(self, index: int, one: CudaMatrix) -> CudaMatrix:  # noqa: D102
        return CudaMatrix(self.kind, replaced(self.blocks, index, one.blocks), self.stacked)

    def arrays(self) -> list[mx.array]:  # noqa: D102
        return [self.blocks]

    def gated(self, up: CudaMatrix, x: mx.array, ids: mx.array) -> mx.array:
        """silu(self x) * (up x), for each of x [n, columns] by its ids [n, k]: [n * k, rows]."""
        return launch(
            "gated",
            [self.blocks, up.blocks, x, ids],
            [((ids.size, self._rows), mx.float32)],
            scalars=[*self.blocks.shape[1:], x.shape[1]],
            blocks=(-(-self._rows // (WARPS * self._rows_per_warp)), ids.size),
            threads=WARPS * WARP,
            kind=self.kind,
            kRows=self._rows_per_warp,
            kPerToken=ids.shape[1],
        )[0]

    def combined(
        self, residual: mx.array, x: mx.array, ids: mx.array, weights: mx.array
    ) -> mx.array:
        """Residual [n, rows] + the weighted sum over k of x [n * k, columns] by ids [n, k]."""
        n, k = ids.shape
        return launch(
            "combined",
            [self.blocks, residual, x, ids, weights],
            [((n, self._rows), mx.float32)],
            scalars=[*self.blocks.shape[1:], x.shape[1]],
            blocks=(-(-self._rows // WARPS), n),
            threads=WARPS * WARP,
            kind=self.kind,
            kPerToken=k,
        )[0]

    @property
    def _rows_per_warp(self) -> int:
        return 2 if self._rows < MANY_ROWS else 4

    @property
    def _rows(self) -> int:
        return self.blocks.shape[1]

    def multiplied(self, x: mx.array, ids: mx.array) -> mx.array:
        """Each row of x [m, at least columns] times the matrix of the stack in ids [m]."""
        return launch(
            "multiply",
            [self.blocks, x, ids],
            [((len(ids), self._rows), mx.float32)],
            scalars=[*self.blocks.shape[1:], x.shape[1]],
            blocks=(-(-self._rows // (WARPS * self._rows_per_warp)), len(ids)),
            threads=WARPS * WARP,
            kind=self.kind,
            kRows=self._rows_per_warp,
        )[0]

    def _written(self) -> mx.array:
        """All of it in float16; what is stored as floats, in float32 unless it is float16."""
        if self.kind in PLAIN:
            floats = self.blocks.view(PLAIN[self.kind])
            return floats if self.kind is GGMLType.F16 else floats.astype(mx.float32)
        return self._converted(self.blocks.reshape(-1, self.blocks.shape[2]), mx.float16).reshape(
            *self.blocks.shape[:2], -1
        )

    def _converted(self, rows: mx.array, dtype: mx.Dtype) -> mx.array:
        """The values [n, columns] of `rows` uint8 [n, bytes]."""
        block_bytes, values = self.kind.block_bytes, self.kind.block_elements
        if self.kind in PLAIN:
            block_bytes, values = 32 * block_bytes, 32
        columns = rows.shape[1] // block_bytes * values
        units = len(rows) * columns // 32
        return launch(
            "convert",
            [rows],
            [((len(rows), columns), dtype)],
            scalars=[units],
            blocks=(-(-units // 128), 1),
            threads=128,
            kind=self.kind,
            T="half_t" if dtype == mx.float16 else "float",
        )[0]


# Made once, so that no step has to make them again.


@cache
def zeros(n: int) -> mx.array:
    """Ids uint32 [n, 1] of the first matrix."""
    return _made(mx.zeros((n, 1), mx.uint32))


@cache
def ones(n: int) -> mx.array:
    """Weights float32 [n, 1]."""
    return _made(mx.ones((n, 1)))


@cache
def counted(matrices: int, n: int) -> mx.array:
    """Ids uint32 [matrices * n]: n times the first, n times the second, and so on."""
    return _made(mx.repeat(mx.arange(matrices, dtype=mx.uint32), n))


def _made(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def _product(
    x: mx.array, weight: mx.array, multiply: Callable[[mx.array, mx.array], mx.array]
) -> mx.array:
    """X times a weight in its type: float32, or float16 with each row's largest value made 1."""
    if weight.dtype == mx.float32:
        return multiply(x, weight)
    scaled, size = _scaled(x)
    return _unscaled(multiply(scaled, weight), size)


@partial(mx.compile, shapeless=True)
def _scaled(x: mx.array) -> tuple[mx.array, mx.array]:
    """X in float16 with each row's largest value made 1, and those values [..., 1]."""
    size = mx.maximum(mx.abs(x).max(axis=-1, keepdims=True), 1e-30)
    return (x / size).astype(mx.float16), size


@partial(mx.compile, shapeless=True)
def _unscaled(y: mx.array, size: mx.array) -> mx.array:
    return y.astype(mx.float32) * size


class CudaGated(Gated):
    """A SwiGLU; of a few tokens and `CudaMatrix` of one type, in two kernels."""

    __slots__ = ()

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:  # noqa: D102
        n = len(x)
        fused = self._fused(residual, x, zeros(n), ones(n))
        return super().plus(residual, x) if fused is None else fused

    def plus_chosen(  # noqa: D102
        self, residual: mx.array, x: mx.array, ids: mx.array, weights: mx.array
    ) -> mx.array:
        fused = self._fused(residual, x, ids, weights)
        return super().plus_chosen(residual, x, ids, weights) if fused is None else fused

    def _fused(
        self, residual: mx.array, x: mx.array, ids: mx.array, weights: mx.array
    ) -> mx.array | None:
        gate, up, down = self.gate, self.up, self.down
        if (
            len(x) > FEW
            or not isinstance(gate, CudaMatrix)
            or not isinstance(up, CudaMatrix)
            or not isinstance(down, CudaMatrix)
            or gate.kind is not up.kind
        ):
            return None
        return down.combined(residual, gate.gated(up, x, ids), ids, weights)

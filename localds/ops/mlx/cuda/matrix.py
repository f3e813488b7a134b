"""Matrices on an NVIDIA GPU: the blocks of the file, in the order of the file.

A few rows are multiplied by a kernel that reads the blocks, in float32. Many rows pay for writing
the matrix out in float16 first, for the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.cuda.source import WARP, launch
from localds.ops.mlx.feed_forward import SORTED_FROM, Gated
from localds.ops.mlx.kept import counted, ones, zeros
from localds.ops.mlx.matrix import PLAIN
from localds.ops.mlx.repack import replaced
from localds.ops.mlx.written import chosen_product, product

FEW = 8
"""Rows of x that are multiplied without writing the matrix out."""
PLAIN_BLOCK = 32
"""Plain floats that the kernels take for a block."""

FEWER_TOGETHER, MORE_TOGETHER = 2, 4
"""Rows of a matrix that a warp does; more where there are `_MANY_ROWS`."""

_WARPS = 4  # of a block
_MANY_ROWS = 4096
_UNITS = 128  # of 32 values, written out by a block
# Bytes of a value that is written out; float16 and float32 are multiplied as they lie.
_ITEMSIZE = {GGMLType.F32: 0, GGMLType.F16: 0, GGMLType.BF16: 4}


@dataclass(frozen=True, slots=True)
class CudaMatrix:
    """Blocks uint8 [rows, bytes], or of a stack [matrices, rows, bytes]."""

    kind: GGMLType
    blocks: mx.array

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        n = x.shape[-2]
        if n > FEW:
            return product(x, self.blocks, self.written, self._itemsize)
        matrices = len(self.blocks) if self.blocks.ndim == 3 else 1
        ids = counted(matrices, n)
        return self.multiplied(x.reshape(-1, x.shape[-1]), ids).reshape(*x.shape[:-1], -1)

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:  # noqa: D102
        n = len(x)
        if n > FEW:
            return residual + self(x)
        return self.combined(residual, x, zeros(n), ones(n))

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:  # noqa: D102
        if len(ids) < SORTED_FROM:
            return self.multiplied(x, ids)
        return chosen_product(x, self.blocks, ids, self.written, self._itemsize)

    def lookup(self, ids: mx.array) -> mx.array:  # noqa: D102
        return self._converted(self.blocks[ids], mx.float32)

    def put(self, index: int, one: CudaMatrix) -> CudaMatrix:  # noqa: D102
        return CudaMatrix(self.kind, replaced(self.blocks, index, one.blocks))

    def arrays(self) -> list[mx.array]:  # noqa: D102
        return [self.blocks]

    def multiplied(self, x: mx.array, ids: mx.array, together: int = 0) -> mx.array:
        """Each row of x [m, columns] times the matrix of the stack in ids [m].

        A warp does `together` rows of it, 0 for as many as suit the matrix.
        """
        together = together or self._together
        return launch(
            "multiply",
            [self.blocks, x, ids],
            [((len(ids), self._rows), mx.float32)],
            scalars=[*self.blocks.shape[-2:], x.shape[1]],
            blocks=(-(-self._rows // (_WARPS * together)), len(ids)),
            threads=_WARPS * WARP,
            kind=self.kind,
            kRows=together,
        )[0]

    def gated(self, up: CudaMatrix, x: mx.array, ids: mx.array, together: int = 0) -> mx.array:
        """silu(self x) * (up x), for each of x [n, columns] by its ids [n, k]: [n * k, rows].

        `together` as for `multiplied`.
        """
        together = together or self._together
        return launch(
            "gated",
            [self.blocks, up.blocks, x, ids],
            [((ids.size, self._rows), mx.float32)],
            scalars=[*self.blocks.shape[-2:], x.shape[1]],
            blocks=(-(-self._rows // (_WARPS * together)), ids.size),
            threads=_WARPS * WARP,
            kind=self.kind,
            kRows=together,
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
            scalars=[*self.blocks.shape[-2:], x.shape[1]],
            blocks=(-(-self._rows // _WARPS), n),
            threads=_WARPS * WARP,
            kind=self.kind,
            kPerToken=k,
        )[0]

    @property
    def _together(self) -> int:
        return FEWER_TOGETHER if self._rows < _MANY_ROWS else MORE_TOGETHER

    @property
    def _rows(self) -> int:
        return self.blocks.shape[-2]

    @property
    def _itemsize(self) -> int:
        return _ITEMSIZE.get(self.kind, 2)

    def written(self, blocks: mx.array) -> mx.array:
        """Blocks in float16; plain floats but these, in float32."""
        if self.kind not in PLAIN:
            return self._converted(blocks, mx.float16)
        floats = blocks.view(PLAIN[self.kind])
        return floats if self.kind is GGMLType.F16 else floats.astype(mx.float32)

    def _converted(self, blocks: mx.array, dtype: mx.Dtype) -> mx.array:
        """The values [..., columns] of `blocks` uint8 [..., bytes], as float16 or float32."""
        block_bytes, elements = self.kind.block_bytes, self.kind.block_elements
        if self.kind in PLAIN:
            block_bytes, elements = PLAIN_BLOCK * block_bytes, PLAIN_BLOCK
        shape = *blocks.shape[:-1], blocks.shape[-1] // block_bytes * elements
        units = blocks.size // block_bytes * elements // 32
        return launch(
            "convert",
            [blocks],
            [(shape, dtype)],
            scalars=[units],
            blocks=(-(-units // _UNITS), 1),
            threads=_UNITS,
            kind=self.kind,
            T="half_t" if dtype == mx.float16 else "float",
        )[0]


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

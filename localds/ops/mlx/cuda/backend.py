"""`Backend` for NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.cuda.attention import CudaMla
from localds.ops.mlx.cuda.matrix import PLAIN_BLOCK, CudaGated, CudaMatrix
from localds.ops.mlx.cuda.proof import matrix_failure, routing_failure
from localds.ops.mlx.cuda.routing import fits, route
from localds.ops.mlx.kept import counted
from localds.ops.mlx.matrix import PLAIN, portable_bytes, portable_matrix
from localds.ops.mlx.routing import MlxRouter

if TYPE_CHECKING:
    from localds.ops import Router
    from localds.ops.mlx.attention import MlxMla
    from localds.ops.mlx.feed_forward import Choose, Gated
    from localds.ops.mlx.matrix import Bytes, Matrix


class CudaBackend:
    """Kernels on the file's blocks, and MLX's operations for many tokens at once.

    Where kernels fail on the device (`proof` says why), MLX's operations compute.
    """

    mla: type[MlxMla] = CudaMla

    def load(self, kind: GGMLType, rows: Bytes) -> Matrix:
        """Bring `rows` uint8 [..., rows, bytes] from the file's map to the device."""
        partial_block = kind in PLAIN and rows.shape[-1] % (PLAIN_BLOCK * kind.block_bytes)
        if partial_block or matrix_failure(kind):
            return portable_matrix(kind, rows)
        # The sum lies in device memory; what is made from numpy's, in pages that move.
        blocks = mx.array(rows) + mx.array(0, mx.uint8)
        mx.eval(blocks)
        return CudaMatrix(kind, blocks)

    def device_bytes(self, kind: GGMLType, nbytes: int) -> int:
        """Bytes on the device of `nbytes` of a type in the file, once `load` has brought them."""
        return portable_bytes(kind, nbytes) if matrix_failure(kind) else nbytes

    def gated(self, gate: Matrix, up: Matrix | None, down: Matrix) -> Gated:
        """A SwiGLU of matrices that `load` made; without `up`, `gate` holds the rows of both."""
        return CudaGated(gate, up, down)

    def router(self, router: Router, weight: mx.array, bias: mx.array | None) -> Choose:
        """The choice of experts."""
        if (
            not fits(router)
            or weight.shape[1] % PLAIN_BLOCK
            or matrix_failure(GGMLType.F32)
            or routing_failure(router)
        ):
            return MlxRouter(router, weight, bias)
        blocks = mx.contiguous(weight).view(mx.uint8)
        return CudaRouter(router, CudaMatrix(GGMLType.F32, blocks), bias)


@dataclass(frozen=True, slots=True)
class CudaRouter:
    """The choice of experts, in two kernels.

    MLX would multiply many tokens with less than float32 holds, and choose differently.
    """

    router: Router
    weight: CudaMatrix
    bias: mx.array | None

    def __call__(self, h: mx.array) -> tuple[mx.array, mx.array]:
        """Experts uint32 and weights float32 of h [n, hidden], both [n, top_k], best first."""
        return route(self.weight.multiplied(h, counted(1, len(h))), self.bias, self.router)

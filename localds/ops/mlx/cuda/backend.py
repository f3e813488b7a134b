"""`Backend` for NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops import Gating, GroupScore, Router
from localds.ops.mlx.cuda.attention import CudaMla
from localds.ops.mlx.cuda.matrix import WARP, CudaGated, CudaMatrix, zeros
from localds.ops.mlx.cuda.proof import failure
from localds.ops.mlx.cuda.source import launch
from localds.ops.mlx.matrix import PLAIN, portable_matrix
from localds.ops.mlx.routing import MlxRouter

if TYPE_CHECKING:
    from localds.ops.mlx.attention import MlxMla
    from localds.ops.mlx.feed_forward import Choose, Gated
    from localds.ops.mlx.matrix import Bytes, Matrix

GATINGS = (Gating.SOFTMAX, Gating.SIGMOID, Gating.SOFTMAX_SELECTED)


class CudaBackend:
    """Kernels on the file's blocks, and MLX's operations for many tokens at once."""

    mla: type[MlxMla] = CudaMla

    def load(self, kind: GGMLType, rows: Bytes) -> Matrix:
        """Bring `rows` uint8 [..., rows, bytes] from the file's map to the device.

        Types whose kernels fail on it (`proof.failure` says why) are computed by MLX's operations.
        """
        if kind in PLAIN and rows.shape[-1] // kind.block_bytes % WARP:
            return portable_matrix(kind, rows)  # no whole blocks of 32
        if failure(kind):
            return portable_matrix(kind, rows)
        # The sum lies in device memory; what is made from numpy's, in pages that move.
        blocks = mx.array(rows) + mx.array(0, mx.uint8)
        mx.eval(blocks)
        stacked = rows.ndim == 3
        return CudaMatrix(kind, blocks if stacked else blocks[None], stacked)

    def gated(self, gate: Matrix, up: Matrix | None, down: Matrix) -> Gated:
        """A SwiGLU of matrices that `load` made; without `up`, `gate` holds the rows of both."""
        return CudaGated(gate, up, down)

    def router(self, router: Router, weight: mx.array, bias: mx.array | None) -> Choose:
        """The choice of experts."""
        if router.top_k > WARP or router.groups > WARP or weight.shape[1] % WARP:
            return MlxRouter(router, weight, bias)
        blocks = mx.contiguous(weight).view(mx.uint8)[None]
        return CudaRouter(router, CudaMatrix(GGMLType.F32, blocks, stacked=False), bias)


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
        return self.chosen(self.weight.multiplied(h, zeros(len(h))[:, 0]))

    def chosen(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The choice from `logits` float32 [n, n_experts], by the kernel."""
        r, n = self.router, len(logits)
        ids, weights = launch(
            "route",
            [logits, no_bias(r.n_experts) if self.bias is None else self.bias],
            [((n, r.top_k), mx.uint32), ((n, r.top_k), mx.float32)],
            scalars=[float(r.scale)],
            blocks=(n, 1),
            threads=WARP,
            kExperts=r.n_experts,
            kTop=r.top_k,
            kGating=GATINGS.index(r.gating),
            kNormalize=r.normalize,
            kGroups=r.groups,
            kGroupsUsed=r.groups_used,
            kGroupMax=r.group_score is GroupScore.MAX,
        )
        return ids, weights


@cache
def no_bias(experts: int) -> mx.array:
    """Zeros, made once."""
    bias = mx.zeros(experts)
    mx.eval(bias)
    return bias

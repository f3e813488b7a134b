"""The kernel that chooses experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops import Gating, GroupScore
from localds.ops.mlx.cuda.source import WARP, launch
from localds.ops.mlx.kept import no_bias

if TYPE_CHECKING:
    from localds.ops import Router

GATINGS = (Gating.SOFTMAX, Gating.SIGMOID, Gating.SOFTMAX_SELECTED)


def fits(router: Router) -> bool:
    """Whether a warp can hold the choice."""
    return router.top_k <= WARP and router.groups <= WARP


def route(logits: mx.array, bias: mx.array | None, router: Router) -> tuple[mx.array, mx.array]:
    """As `choose_experts`: experts uint32 and weights float32 [n, top_k], best first."""
    r, n = router, len(logits)
    ids, weights = launch(
        "route",
        [logits, no_bias(r.n_experts) if bias is None else bias],
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

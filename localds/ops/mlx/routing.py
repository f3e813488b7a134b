"""The choice of experts by MLX operations."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from localds.ops import Gating, GroupScore, Router


@dataclass(frozen=True, slots=True)
class MlxRouter:
    """`weight` float32 [n_experts, hidden], and `bias` [n_experts] on the choice."""

    router: Router
    weight: mx.array
    bias: mx.array | None

    def __call__(self, h: mx.array) -> tuple[mx.array, mx.array]:
        """Experts uint32 and weights float32 of h [n, hidden], both [n, top_k], best first."""
        return choose_experts(h @ self.weight.T, self.bias, self.router)


def choose_experts(
    logits: mx.array, bias: mx.array | None, router: Router
) -> tuple[mx.array, mx.array]:
    """Each token's experts uint32 and weights float32 [n, top_k], best first."""
    scores = expert_scores(logits, router)
    choice = scores if bias is None else scores + bias
    choice = mx.where(mx.isnan(choice), -mx.inf, choice)
    if router.groups > 1:
        choice = _drop_groups(choice, router)
    ids = mx.argsort(-choice, axis=-1)[:, : router.top_k]
    return ids, expert_weights(scores, ids, router)


def expert_scores(logits: mx.array, router: Router) -> mx.array:
    """How well each expert [n, n_experts] does, before any bias."""
    match router.gating:
        case Gating.SOFTMAX:
            return mx.softmax(logits, axis=-1, precise=True)
        case Gating.SIGMOID:
            return mx.sigmoid(logits)
        case Gating.SOFTMAX_SELECTED:
            return logits


def expert_weights(scores: mx.array, ids: mx.array, router: Router) -> mx.array:
    """What the experts ids [n, top_k] count, by their scores."""
    weights = mx.take_along_axis(scores, ids, axis=-1)
    if router.gating is Gating.SOFTMAX_SELECTED:
        weights = mx.softmax(weights, axis=-1, precise=True)
    if router.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * router.scale


def _drop_groups(choice: mx.array, router: Router) -> mx.array:
    """Leaves only the best groups in the choice; of equal ones, the first."""
    groups = choice.reshape(len(choice), router.groups, -1)
    if router.group_score is GroupScore.MAX or groups.shape[-1] < 2:
        score = groups.max(axis=-1)
    else:
        score = mx.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
    mine, other = score[:, :, None], score[:, None]
    index = mx.arange(router.groups)
    earlier = index < index[:, None]
    better = ((other > mine) | ((other == mine) & earlier)).sum(axis=-1)
    kept = (better < router.groups_used)[..., None]
    return mx.where(kept, groups, -mx.inf).reshape(choice.shape)

"""The choice of experts, its gradient, and how it is kept balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.routing import choose_experts, expert_scores, expert_weights

if TYPE_CHECKING:
    from localds.ops import Router


@dataclass(frozen=True, slots=True)
class Balance:
    """How tokens were divided among experts, padding left out.

    `loads` float32 [layers with experts, experts] counts tokens sent to each; `loss` is the
    auxiliary loss, a scalar that is 0 unless the model has one.
    """

    loads: mx.array
    loss: mx.array

    def shares(self) -> mx.array:
        """Each expert's share of its layer's tokens [layers, experts], 1 in all."""
        return self.loads / mx.maximum(self.loads.sum(axis=-1, keepdims=True), 1)

    def unevenness(self) -> mx.array:
        """The largest load over the mean one [layers]: 1 where all experts have as many."""
        return self.shares().max(axis=-1) * self.loads.shape[-1]


def updated_biases(biases: mx.array, loads: mx.array, rate: float = 0.001) -> mx.array:
    """DeepSeek-V3's rule (arXiv:2412.19437, 2.1.2), for [layers, experts].

    A bias falls by `rate` where its expert has more than the mean load, and rises where less.
    """
    return biases + rate * mx.sign(loads.mean(axis=-1, keepdims=True) - loads)


def route(logits: mx.array, bias: mx.array | None, router: Router) -> tuple[mx.array, mx.array]:
    """As `choose_experts`, with a gradient of the weights: ids and weights [n, top_k].

    The bias takes part in the choice alone, which has no gradient.
    """
    ids = mx.stop_gradient(choose_experts(mx.stop_gradient(logits), bias, router)[0])
    return ids, expert_weights(expert_scores(logits, router), ids, router)


def count_loads(ids: mx.array, real: mx.array, experts: int) -> mx.array:
    """Tokens sent to each expert, by row of a batch: ids [n, top_k] to [rows, experts].

    `real` [rows, length] is 1 for tokens that count, n of them and of others.
    """
    chosen = mx.put_along_axis(mx.zeros((len(ids), experts)), ids, mx.array(1.0), axis=-1)
    return (chosen.reshape(*real.shape, experts) * real[..., None]).sum(axis=1)


def balance_loss(logits: mx.array, loads: mx.array, real: mx.array, top_k: int) -> mx.array:
    """DeepSeek-V2's expert-level loss (arXiv:2405.04434, 2.1.2) without its factor alpha.

    Of each row, the sum over experts of their share of tokens (1 if all have as many) times their
    mean score; then the mean over rows. `logits` [n, experts], `loads` as of `count_loads`.
    """
    experts = logits.shape[-1]
    tokens = real.sum(axis=1, keepdims=True)
    share = loads * experts / (top_k * mx.maximum(tokens, 1))
    scores = mx.softmax(logits, axis=-1).reshape(*real.shape, experts) * real[..., None]
    mean_score = scores.sum(axis=1) / mx.maximum(tokens, 1)
    rows = mx.maximum((tokens > 0).sum(), 1)
    return (share * mean_score).sum() / rows

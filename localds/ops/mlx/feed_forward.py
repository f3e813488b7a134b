"""Feed-forward layers on MLX: the dense SwiGLU, and the mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.ops.mlx.matrix import Matrix

    Choose = Callable[[mx.array], tuple[mx.array, mx.array]]

SORTED_FROM = 64
"""Rows from which those of one expert are brought together, so that it is read once."""


def _product(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


@dataclass(frozen=True, slots=True)
class Gated:
    """down(silu(gate(x)) * up(x)); without `up`, `gate` holds the rows of both."""

    gate: Matrix
    up: Matrix | None
    down: Matrix

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:
        """Residual + the layer of x, both float32 [n, hidden]."""
        up = None if self.up is None else self.up(x)
        return self.down.plus(residual, self._middle(self.gate(x), up))

    def plus_chosen(
        self, residual: mx.array, x: mx.array, ids: mx.array, weights: mx.array
    ) -> mx.array:
        """Residual + the weighted sum of each token's experts; ids and weights [n, top_k]."""
        n, k = ids.shape
        flat = ids.reshape(-1)
        if n * k < SORTED_FROM:
            out = self._experts(mx.repeat(x, k, axis=0), flat)
        else:
            order = mx.argsort(flat)
            out = self._experts(x[order // k], flat[order])[mx.argsort(order)]
        return residual + (out.reshape(n, k, -1) * weights[..., None]).sum(axis=1)

    def _experts(self, x: mx.array, ids: mx.array) -> mx.array:
        up = None if self.up is None else self.up.chosen(x, ids)
        return self.down.chosen(self._middle(self.gate.chosen(x, ids), up), ids)

    @staticmethod
    def _middle(gate: mx.array, up: mx.array | None) -> mx.array:
        if up is None:
            gate, up = mx.split(gate, 2, axis=-1)
        return _product(gate, up)


@dataclass(frozen=True, slots=True)
class MlxFfn:
    """A dense feed-forward layer."""

    norm: mx.array
    eps: float
    layer: Gated

    def __call__(self, x: mx.array) -> mx.array:
        """Return x + feed_forward(norm(x))."""
        return self.layer.plus(x, mx.fast.rms_norm(x, self.norm, self.eps))


@dataclass(frozen=True, slots=True)
class MlxMoe:
    """A mixture-of-experts layer."""

    norm: mx.array
    eps: float
    choose: Choose
    experts: Gated
    shared: Gated | None

    def __call__(self, x: mx.array) -> mx.array:
        """Return x + experts(norm(x))."""
        h = mx.fast.rms_norm(x, self.norm, self.eps)
        out = self.experts.plus_chosen(x, h, *self.choose(h))
        return out if self.shared is None else self.shared.plus(out, h)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts uint32 and their weights that x would go to, both [n_tokens, top_k]."""
        return self.choose(mx.fast.rms_norm(x, self.norm, self.eps))

"""Feed-forward layers on MLX: the dense SwiGLU, and the mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

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
            out = self.chosen(mx.repeat(x, k, axis=0), flat)
        else:
            order = mx.argsort(flat)
            out = self.chosen(x[order // k], flat[order])[mx.argsort(order)]
        return residual + weighted_sum(out, weights)

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:
        """Each row of x [m, hidden] through the expert in ids [m]: [m, hidden].

        Rows of the same expert lie together where there are many.
        """
        up = None if self.up is None else self.up.chosen(x, ids)
        return self.down.chosen(self._middle(self.gate.chosen(x, ids), up), ids)

    def put(self, index: int, one: Gated) -> Self:
        """A stack with `one` as its expert `index`, see `Matrix.put`."""
        up = None if self.up is None or one.up is None else self.up.put(index, one.up)
        return type(self)(self.gate.put(index, one.gate), up, self.down.put(index, one.down))

    def arrays(self) -> list[mx.array]:
        """What the matrices are kept in."""
        parts = (self.gate, self.up, self.down)
        return [array for part in parts if part is not None for array in part.arrays()]

    @staticmethod
    def _middle(gate: mx.array, up: mx.array | None) -> mx.array:
        if up is None:
            gate, up = mx.split(gate, 2, axis=-1)
        return _product(gate, up)


def weighted_sum(outputs: mx.array, weights: mx.array) -> mx.array:
    """Of outputs [n * top_k, hidden], each token's sum by its weights [n, top_k]: [n, hidden]."""
    n, k = weights.shape
    return (outputs.reshape(n, k, -1) * weights[..., None]).sum(axis=1)


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
class Routed:
    """What a mixture-of-experts layer knows of its input before any expert is asked.

    `states` float32 [n, hidden] are normalized; `ids` uint32 and `weights` float32 [n, top_k].
    """

    states: mx.array
    ids: mx.array
    weights: mx.array


@dataclass(frozen=True, slots=True)
class MlxMoe:
    """A mixture-of-experts layer whose experts all lie on the device."""

    norm: mx.array
    eps: float
    choose: Choose
    experts: Gated
    shared: Gated | None
    counter: UseCounter

    def __call__(self, x: mx.array) -> mx.array:
        """Return x + experts(norm(x))."""
        return self.add_experts(x, self.route(x))

    def route(self, x: mx.array) -> Routed:
        """Where x [n, hidden] would go."""
        h = mx.fast.rms_norm(x, self.norm, self.eps)
        return Routed(h, *self.choose(h))

    def add_experts(self, x: mx.array, routed: Routed) -> mx.array:
        """X + the experts of `routed`, and the shared one."""
        out = self.experts.plus_chosen(x, routed.states, routed.ids, routed.weights)
        return out if self.shared is None else self.shared.plus(out, routed.states)

    def uses(self) -> NDArray[np.uint64]:
        """Tokens sent to each expert since the layer was made, uint64 [experts]."""
        return self.counter.uses.copy()


class UseCounter:
    """How many tokens went to each expert, `uses` uint64 [experts]. Read from any thread."""

    def __init__(self, experts: int) -> None:
        self.uses = np.zeros(experts, np.uint64)

    def add(self, ids: NDArray[np.integer[Any]]) -> None:
        """Count the experts `ids`."""
        self.uses += np.bincount(ids.reshape(-1), minlength=len(self.uses)).astype(np.uint64)

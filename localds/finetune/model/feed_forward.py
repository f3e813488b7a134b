"""Feed-forward layers in training: the dense SwiGLU, and the mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import mlx.core as mx

from localds.finetune.model.gradients import differentiable, with_vjp
from localds.finetune.model.matrices import rows_of
from localds.finetune.model.routing import balance_loss, count_loads, route
from localds.finetune.model.slices import in_slices, token_slices

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from localds.finetune.model.adapter import Linear, StackedLinear, Trained
    from localds.finetune.model.frozen import FrozenMatrix
    from localds.finetune.model.packing import Packing
    from localds.ops import Router


class Forwarded(NamedTuple):
    """What comes out of a layer, and of one with experts, how it used them.

    `x` float32 [rows, length, hidden]; `loads` float32 [experts]; `balance` is the auxiliary loss.
    """

    x: mx.array
    loads: mx.array | None = None
    balance: mx.array | None = None


class Experts(Protocol):
    """The routed experts of one layer, wherever they lie."""

    def chosen(self, x: mx.array, ids: mx.array, trained: Trained) -> mx.array:
        """Each row of x [m, hidden] through its expert in ids uint32 [m], ascending: [m, hidden].

        Differentiable in x, and in the parameters that are for these experts. It may be called
        while gradients are traced, and again with the same x when they are computed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Gated:
    """down(silu(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x: mx.array, trained: Trained) -> mx.array:
        """The layer of x [n, hidden]."""

        def some(_: slice, rows: Sequence[mx.array], trained: Trained) -> mx.array:
            (x,) = rows
            return self.down(_swiglu(self.gate(x, trained), self.up(x, trained)), trained)

        width = rows_of(cast("FrozenMatrix", self.gate.frozen).matrix)
        slices = token_slices(len(x), _KEPT * width)
        return in_slices(some, slices, [x], _only(trained, (self.gate, self.up, self.down)))


@dataclass(frozen=True, slots=True)
class ResidentExperts:
    """Experts that lie on the device."""

    gate: StackedLinear
    up: StackedLinear
    down: StackedLinear

    def chosen(self, x: mx.array, ids: mx.array, trained: Trained) -> mx.array:  # noqa: D102
        middle = _swiglu(self.gate(x, ids, trained), self.up(x, ids, trained))
        return self.down(middle, ids, trained)

    def mixed(self, h: mx.array, ids: mx.array, weights: mx.array, trained: Trained) -> mx.array:
        """The sum of each token's experts in ids [n, top_k], by weights [n, top_k]."""

        def some(part: slice, rows: Sequence[mx.array], trained: Trained) -> mx.array:
            h, weights = rows
            return _mixed(self, h, ids[part], weights, trained)

        widths = h.shape[-1] + rows_of(self.gate.frozen.stack)
        slices = token_slices(len(h), _KEPT * ids.shape[-1] * widths)
        mine = _only(trained, (self.gate, self.up, self.down))
        return in_slices(some, slices, [h, weights], mine)


# Bytes that are kept of a token for each of a layer's widths: three float32.
_KEPT = 12


def _only(trained: Trained, layers: Collection[Linear | StackedLinear]) -> Trained:
    """The parameters of these layers."""
    names = [layer.adapter.name for layer in layers if layer.adapter is not None]
    return trained._replace(parameters={name: trained.parameters[name] for name in names})


@dataclass(frozen=True, slots=True)
class TrainFfn:
    """A dense feed-forward layer."""

    norm: mx.array
    eps: float
    layer: Gated

    def __call__(
        self,
        x: mx.array,
        packing: Packing,  # noqa: ARG002
        trained: Trained,
        bias: mx.array | None,  # noqa: ARG002
    ) -> Forwarded:
        """Return x + feed_forward(norm(x))."""
        h = mx.fast.rms_norm(x, self.norm, self.eps).reshape(-1, x.shape[-1])
        return Forwarded(x + self.layer(h, trained).reshape(x.shape))


@dataclass(frozen=True, slots=True)
class TrainMoe:
    """A mixture of experts. `bias` [experts] is the file's, `balanced` asks for `balance_loss`."""

    norm: mx.array
    eps: float
    router: Router
    logits: Linear
    bias: mx.array | None
    experts: Experts
    shared: Gated | None
    balanced: bool

    def __call__(
        self, x: mx.array, packing: Packing, trained: Trained, bias: mx.array | None
    ) -> Forwarded:
        """Return x + experts(norm(x)), chosen with `bias` [experts] if it is given."""
        h = mx.fast.rms_norm(x, self.norm, self.eps).reshape(-1, x.shape[-1])
        logits = self.logits(h, trained)
        ids, weights = route(logits, self.bias if bias is None else bias, self.router)
        out = self._mixed(h, ids, weights, trained)
        if self.shared is not None:
            out = out + self.shared(h, trained)
        loads = mx.stop_gradient(count_loads(ids, packing.real, self.router.n_experts))
        balance = None
        if self.balanced:
            balance = balance_loss(logits, loads, packing.real, self.router.top_k)
        return Forwarded(x + out.reshape(x.shape), loads.sum(axis=0), balance)

    def _mixed(self, h: mx.array, ids: mx.array, weights: mx.array, trained: Trained) -> mx.array:
        if isinstance(self.experts, ResidentExperts):
            return self.experts.mixed(h, ids, weights, trained)
        return _mixed(self.experts, h, ids, weights, trained)


def _mixed(
    experts: Experts, h: mx.array, ids: mx.array, weights: mx.array, trained: Trained
) -> mx.array:
    """The weighted sum of each token's experts, with the rows of an expert together."""
    n, k = ids.shape
    flat = ids.reshape(-1)
    order = mx.argsort(flat)
    places = mx.argsort(order)
    out = experts.chosen(_spread(h, order, places), flat[order], trained)
    by_token = _permuted(out, places, order).reshape(n, k, -1)
    return (by_token * weights[..., None]).sum(axis=1)


# MLX's gradients of rows that are taken would add in any order; these do not.


def _spread(x: mx.array, order: mx.array, places: mx.array) -> mx.array:
    """Rows of x [n, hidden], each several times, in `order` of their pairs [n * k]."""
    n, hidden = x.shape
    k = len(order) // n

    def gradient(dy: mx.array) -> mx.array:
        return dy[places].reshape(n, k, hidden).sum(axis=1)

    return differentiable(x, lambda x: x[order // k], gradient)


def _permuted(x: mx.array, order: mx.array, places: mx.array) -> mx.array:
    """Rows of x in another order, where `places` would bring them back."""
    return differentiable(x, lambda x: x[order], lambda dy: dy[places])


def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _silu_times_gradient(
    arguments: tuple[mx.array, mx.array],
    dy: mx.array,
    _: mx.array,
) -> tuple[mx.array, mx.array]:
    gate, up = arguments
    share = mx.sigmoid(gate)
    silu = gate * share
    return dy * up * (share + silu * (1 - share)), dy * silu


# For the gradient, nothing but gate and up is kept.
_swiglu = with_vjp(_silu_times, _silu_times_gradient)

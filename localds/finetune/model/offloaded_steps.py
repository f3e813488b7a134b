"""One layer at a time, forward and back, where no gradient is traced around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx

from localds.finetune.model.feed_forward import Forwarded
from localds.finetune.model.routing import balance_loss, count_loads, route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from localds.finetune.model.adapter import Parameters, Trained
    from localds.finetune.model.attention import TrainGqa, TrainMla
    from localds.finetune.model.feed_forward import TrainMoe
    from localds.finetune.model.offloaded import OffloadedExperts
    from localds.finetune.model.packing import Packing

    Run = Callable[[mx.array, Packing, Trained, mx.array | None], Forwarded]
    Sent = tuple[mx.array, mx.array, mx.array]


class Kept(NamedTuple):
    """What is kept of a layer for the gradient: its input, and perhaps what went to its experts."""

    x: mx.array
    sent: Sent | None = None


class Step(Protocol):
    """A layer, with the parameters that it is computed with."""

    @property
    def trained(self) -> Trained: ...  # noqa: D102

    def forward(self, x: mx.array) -> tuple[Forwarded, Kept]:
        """The layer of x [rows, length, hidden]."""
        ...

    def gradients(
        self, kept: Kept, dy: mx.array, dbalance: mx.array
    ) -> tuple[mx.array, Parameters]:
        """The gradients of x and of the parameters, for those of the result and its balance."""
        ...


@dataclass(frozen=True, slots=True)
class WholeStep:
    """A layer that lies on the device; `balanced` if it has a balance."""

    layer: Run
    balanced: bool
    packing: Packing
    trained: Trained
    bias: mx.array | None

    def forward(self, x: mx.array) -> tuple[Forwarded, Kept]:  # noqa: D102
        return self.layer(x, self.packing, self.trained, self.bias), Kept(x)

    def gradients(  # noqa: D102
        self, kept: Kept, dy: mx.array, dbalance: mx.array
    ) -> tuple[mx.array, Parameters]:
        def run(x: mx.array, mine: Parameters) -> list[mx.array]:
            done = self.layer(x, self.packing, self.trained._replace(parameters=mine), self.bias)
            return _present(done.x, done.balance)

        back = [dy, dbalance] if self.balanced else [dy]
        return _gradients(run, kept.x, self.trained.parameters, back)


class Routed(NamedTuple):
    """What a layer computes besides its routed experts.

    `x` [rows, length, hidden] is what their sum is added to, `states` [n, hidden] what goes to
    them, by `ids` and `weights` [n, top_k]; `shared` [n, hidden] is the shared expert.
    """

    x: mx.array
    states: mx.array
    ids: mx.array
    weights: mx.array
    shared: mx.array | None
    loads: mx.array
    balance: mx.array | None


@dataclass(frozen=True, slots=True)
class DividedStep:
    """A layer whose `experts` are offloaded. With `keep`, what goes to them is kept."""

    attention: TrainMla | TrainGqa
    moe: TrainMoe
    experts: OffloadedExperts
    keep: bool
    packing: Packing
    trained: Trained
    bias: mx.array | None

    def forward(self, x: mx.array) -> tuple[Forwarded, Kept]:  # noqa: D102
        routed = self._route(x, self.trained.parameters)
        sent = _sent(routed)
        out = self.experts.mixed(*sent, self.trained)
        if routed.shared is not None:
            out = out + routed.shared
        done = Forwarded(routed.x + out.reshape(x.shape), routed.loads, routed.balance)
        return done, Kept(x, sent if self.keep else None)

    def gradients(  # noqa: D102
        self, kept: Kept, dy: mx.array, dbalance: mx.array
    ) -> tuple[mx.array, Parameters]:
        sent = kept.sent or _sent(self._route(kept.x, self.trained.parameters))
        dout = dy.reshape(-1, dy.shape[-1])
        found = self.experts.mixed_gradients(*sent, dout, self.trained)
        others = {
            name: values
            for name, values in self.trained.parameters.items()
            if name not in found.parameters
        }

        def run(x: mx.array, mine: Parameters) -> list[mx.array]:
            done = self._route(x, mine)
            return _present(done.x, done.states, done.weights, done.shared, done.balance)

        back = _present(
            dy,
            found.x,
            found.weights,
            None if self.moe.shared is None else dout,
            dbalance if self.moe.balanced else None,
        )
        dx, slopes = _gradients(run, kept.x, others, back)
        return dx, slopes | found.parameters

    def _route(self, x: mx.array, parameters: Parameters) -> Routed:
        moe, real = self.moe, self.packing.real
        trained = self.trained._replace(parameters=parameters)
        x = self.attention(x, self.packing, trained)
        states = mx.fast.rms_norm(x, moe.norm, moe.eps).reshape(-1, x.shape[-1])
        logits = moe.logits(states, trained)
        ids, weights = route(logits, moe.bias if self.bias is None else self.bias, moe.router)
        loads = mx.stop_gradient(count_loads(ids, real, moe.router.n_experts))
        return Routed(
            x=x,
            states=states,
            ids=ids,
            weights=weights,
            shared=None if moe.shared is None else moe.shared(states, trained),
            loads=loads.sum(axis=0),
            balance=balance_loss(logits, loads, real, moe.router.top_k) if moe.balanced else None,
        )


def _sent(routed: Routed) -> Sent:
    sent = routed.states, routed.ids, routed.weights
    mx.eval(sent)
    return sent


def listed(parameters: Parameters) -> list[mx.array]:
    """The arrays, in order."""
    return [array for values in parameters.values() for array in values.values()]


def like(parameters: Parameters, arrays: Sequence[mx.array]) -> Parameters:
    """Arrays in the order of `listed`, named as in `parameters`."""
    rest = iter(arrays)
    return {name: {kind: next(rest) for kind in values} for name, values in parameters.items()}


def _gradients(
    run: Callable[[mx.array, Parameters], list[mx.array]],
    x: mx.array,
    parameters: Parameters,
    back: list[mx.array],
) -> tuple[mx.array, Parameters]:
    """The gradients of x and of the parameters, for those of what `run` returns; not computed."""

    def compute(x: mx.array, *flat: mx.array) -> list[mx.array]:
        return run(x, like(parameters, flat))

    _, (dx, *slopes) = mx.vjp(compute, [x, *listed(parameters)], back)
    return dx, like(parameters, slopes)


def _present(*results: mx.array | None) -> list[mx.array]:
    return [result for result in results if result is not None]

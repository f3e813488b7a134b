"""Everything about a run that changes while it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from localds.finetune.loop.optimizer import AdamW
    from localds.finetune.loop.protocols import Params


@dataclass(frozen=True, slots=True)
class Best:
    """The evaluation with the lowest loss."""

    step: int
    loss: float
    file: str
    """The name of the file with its parameters, in the run's folder."""


@dataclass(slots=True)
class Counters:
    """Where a run is."""

    step: int = 0
    """Steps done, skipped ones among them."""
    tokens: int = 0
    seconds: float = 0.0
    """Spent on steps."""
    loss: float | None = None
    """Of the last step that was taken."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int | None = None
    """The step of the last evaluation that was completed."""
    without_improvement: int = 0
    """Evaluations in a row."""
    best: Best | None = None

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Counters:
        """The counters that were saved."""
        best = saved["best"]
        return cls(**{**saved, "best": Best(**best) if best else None})


@dataclass(slots=True)
class RunState:
    """What is trained, the optimizer's memory of it, and the counters."""

    params: Params
    optimizer: AdamW
    counters: Counters = field(default_factory=Counters)


def pack(state: RunState, model_state: dict[str, mx.array]) -> dict[str, mx.array]:
    """All arrays of a run in one flat dict."""
    tensors = pack_params(state.params, model_state)
    for name, leaves in state.optimizer.moments.items():
        for leaf, moments in leaves.items():
            tensors |= {f"moments/{name}/{leaf}/{part}": a for part, a in moments.items()}
    return tensors


def pack_params(params: Params, model_state: dict[str, mx.array]) -> dict[str, mx.array]:
    """What is needed to use the adapters, in one flat dict."""
    tensors = {
        f"params/{name}/{leaf}": array
        for name, leaves in params.items()
        for leaf, array in leaves.items()
    }
    return tensors | {f"model/{name}": array for name, array in model_state.items()}


def unpack_params(tensors: dict[str, mx.array]) -> tuple[Params, dict[str, mx.array]]:
    """The parameters and the model's own state, in the order of `tensors`."""
    params: Params = {}
    model_state: dict[str, mx.array] = {}
    for key, array in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "params":
            name, leaf = rest.rsplit("/", 1)
            params.setdefault(name, {})[leaf] = array
        elif kind == "model":
            model_state[rest] = array
    return params, model_state


def unpack_moments(tensors: dict[str, mx.array], optimizer: AdamW) -> None:
    """Give an optimizer the moments that were packed."""
    for key, array in tensors.items():
        if key.startswith("moments/"):
            name, leaf, part = key.removeprefix("moments/").rsplit("/", 2)
            optimizer.moments.setdefault(name, {}).setdefault(leaf, {})[part] = array

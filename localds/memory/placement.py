"""Where a model's weights go: into memory as a whole, or experts on demand into a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.memory.plan import BudgetError, is_routed
from localds.memory.trunk import PAGE
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from localds.gguf import GGUFFile, Tensor
    from localds.memory.plan import Plan
    from localds.models.geometry import Geometry

# Of the slots, those for what was read last, and those for reads ahead of the layer they are for.
_WINDOW_SHARE = 16
_AHEAD_SHARE = 32
_MOST_ASIDE = 64


@dataclass(frozen=True, slots=True)
class Placement:
    """What lies in memory. Sizes in bytes.

    With `resident` everything does, in the map of the file. Otherwise all but the routed experts,
    and of those as many as there are `slots`, each large enough for any expert: `window` for what
    was read last, `ahead` for what will probably be needed next, the others (`main`) for what is
    used most. `slots_total` would hold all experts.
    """

    plan: Plan
    budget: int | None
    resident: bool
    slot_bytes: int = 0
    slots: int = 0
    slots_total: int = 0
    window: int = 0
    ahead: int = 0
    least_slots: int = 0

    @property
    def most_slots(self) -> int:
        """Slots with which nothing would be read twice."""
        return self.slots_total + 2 * _MOST_ASIDE

    @property
    def main(self) -> int:
        """Slots for the experts that are used most."""
        return self.slots - self.window - self.ahead

    @property
    def pool(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slot_bytes

    @property
    def total(self) -> int:
        """Bytes in memory with a full context."""
        if self.resident:
            return self.plan.total
        return self.plan.trunk + self.pool + self.plan.cache + self.plan.runtime


def place(
    gguf: GGUFFile, geometry: Geometry, plan: Plan, budget: int | None, *, pooled: bool = False
) -> Placement:
    """Decide what lies in memory within `budget` bytes; None for as many as it takes.

    With `pooled`, experts lie in a pool even where all of them fit. Raises `BudgetError` where not
    even the trunk and a few experts fit.
    """
    if not pooled and (budget is None or plan.total <= budget):
        return Placement(plan, budget, resident=True)
    slot = slot_bytes(gguf, geometry)
    total = (geometry.moe_layers - len(plan.on_device)) * geometry.experts
    least = 3 * geometry.experts_used
    fixed = plan.trunk + plan.cache + plan.runtime
    if budget is not None and (not total or fixed + least * slot > budget):
        raise BudgetError(_what_would_fit(plan, budget, least * slot if total else None))
    used = geometry.experts_used
    # Those aside come on top: with all experts in the main part nothing is read any more.
    slots = total + 2 * _MOST_ASIDE
    if budget is not None:
        slots = min(slots, (budget - fixed) // slot)
    return Placement(
        plan,
        budget,
        resident=False,
        slot_bytes=slot,
        slots=slots,
        slots_total=total,
        window=min(max(used, slots // _WINDOW_SHARE), _MOST_ASIDE),
        ahead=min(max(used, slots // _AHEAD_SHARE), _MOST_ASIDE),
        least_slots=least,
    )


def describe(placement: Placement) -> str:
    """What lies in memory of a model that does not fit, in one line."""
    return (
        f"{format_size(placement.plan.total)} do not fit in "
        f"{format_size(placement.budget or 0)}: {placement.slots} of {placement.slots_total} "
        f"experts at a time in memory ({format_size(placement.pool)}), the others on disk"
    )


def slot_bytes(gguf: GGUFFile, geometry: Geometry) -> int:
    """Bytes of a slot that holds any of the model's experts, its parts in pages of their own."""
    return max(
        (
            sum(-(-part // PAGE) * PAGE + PAGE for part in parts)
            for parts in _expert_parts(gguf, geometry)
        ),
        default=0,
    )


def hit_rate(placement: Placement, usage: NDArray[np.uint32] | None = None) -> float:
    """The share of experts that will be in memory when they are needed, from 0 to 1.

    `usage` uint32 [layers, experts] are uses in earlier runs; without them all experts are alike.
    """
    if placement.resident:
        return 1.0
    if usage is None or not usage.any():
        return min(placement.main / placement.slots_total, 1.0)
    most = sorted(usage.ravel().tolist(), reverse=True)
    return float(sum(most[: placement.main]) / sum(most))


def missed_bytes(gguf: GGUFFile, geometry: Geometry, hits: float) -> float:
    """Bytes that a decoded token reads from disk when a share `hits` of experts is in memory."""
    return (1 - hits) * _expert_bytes(gguf, geometry)


def active_bytes(gguf: GGUFFile, geometry: Geometry, placement: Placement) -> float:
    """Bytes of weights that a decoded token reads from memory."""
    embedding = placement.plan.parts.get("embedding", 0)
    return placement.plan.trunk - embedding + _expert_bytes(gguf, geometry)


def routed_tensors(gguf: GGUFFile, geometry: Geometry) -> dict[int, list[Tensor]]:
    """The stacked experts of each layer that has some, by the number of its block, ascending."""
    layers: dict[int, list[Tensor]] = {}
    if not geometry.experts:
        return layers
    for name, tensor in gguf.tensors.items():
        if is_routed(name) and (block := int(name.split(".")[1])) < geometry.layers:
            layers.setdefault(block, []).append(tensor)
    return dict(sorted(layers.items()))


def _expert_bytes(gguf: GGUFFile, geometry: Geometry) -> float:
    """Bytes of the routed experts that a token uses, in all layers."""
    return geometry.experts_used * sum(sum(parts) for parts in _expert_parts(gguf, geometry))


def _expert_parts(gguf: GGUFFile, geometry: Geometry) -> Sequence[Sequence[int]]:
    """For each layer with experts, the bytes of each tensor's share of one expert."""
    return [
        [tensor.nbytes // geometry.experts for tensor in layer]
        for layer in routed_tensors(gguf, geometry).values()
    ]


def _what_would_fit(plan: Plan, budget: int, least_pool: int | None) -> str:
    """The message of a `BudgetError`: least_pool is None for a model without experts."""
    weights = plan.trunk + (least_pool or 0)
    floor = weights + plan.runtime + plan.cache
    kept = "" if least_pool is None else ", most experts left on disk,"
    cache = f" with a context of {plan.context} tokens" if plan.cache else " beside the GPU"
    text = (
        f"the model needs {format_size(floor)}{cache}{kept} "
        f"and the budget is {format_size(budget)}: "
    )
    # With the cache on a GPU, no smaller context takes less.
    tokens = (budget - weights - plan.runtime) // plan.cache_per_token if plan.cache else 0
    if tokens >= 1:
        return text + f"a context of {tokens} tokens would fit (--context {tokens})"
    least = format_size(weights + plan.runtime + plan.cache_per_token)
    if not plan.cache:
        other = "" if least_pool is None else ", or leave more experts to the GPU"
        return f"{text}give more with --ram{other}"
    return text + f"at least {least} are needed; use a smaller quantization or a smaller model"

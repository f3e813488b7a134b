"""How many experts fit on a GPU beside what must be there, and what to do where that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.memory.gpu_sizes import scratch_bytes
from localds.memory.plan import BudgetError
from localds.units import format_size

if TYPE_CHECKING:
    from localds.memory.gpu_sizes import DeviceSizes, Pass
    from localds.memory.plan import Plan
    from localds.models.geometry import Geometry
    from localds.ops.mlx_device import Gpu


@dataclass(frozen=True, slots=True)
class Room:
    """What may be taken of the GPU's memory, and of unified memory in all.

    The process takes `runtime` of the latter, and `beside` for experts where these are split.
    """

    vram: int
    unified: int | None
    runtime: int
    beside: int

    def budget(self, *, split: bool) -> int:
        """Bytes that the device may take."""
        if self.unified is None:
            return self.vram
        return min(self.vram, self.unified - self.runtime - (self.beside if split else 0))


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model takes on the device, by the slots of its layers."""

    sizes: DeviceSizes
    geometry: Geometry
    plan: Plan
    run: Pass

    def equal(self, count: int) -> tuple[int, ...]:
        """As many slots for each layer."""
        return (count,) * len(self.sizes.blocks)

    def is_split(self, slots: tuple[int, ...]) -> bool:
        """Whether some experts do not lie on the device."""
        return any(count < self.sizes.experts for count in slots)

    def total(self, slots: tuple[int, ...], context: int) -> int:
        """Bytes with a cache of `context` tokens."""
        pool = sum(n * b for n, b in zip(slots, self.sizes.expert_bytes, strict=True))
        staging = self.sizes.staging if self.is_split(slots) else 0
        cache = context * self.plan.cache_per_token
        return self.sizes.trunk + cache + self.scratch(slots, context) + pool + staging

    def scratch(self, slots: tuple[int, ...], context: int) -> int:
        """Bytes that a pass takes for itself."""
        staged = self.sizes.most_staged if self.is_split(slots) else 0
        stack = max((*slots, staged), default=0)
        return scratch_bytes(self.sizes, self.geometry, self.run, context, stack)

    def fit(self, slots: tuple[int, ...], room: Room, context: int | None = None) -> bool:
        """Whether they do, with the plan's context unless another is given."""
        needed = self.total(slots, self.plan.context if context is None else context)
        return needed <= room.budget(split=self.is_split(slots))


def most_slots(needs: Needs, room: Room) -> tuple[int, ...]:
    """As many slots as fit, the same for each layer; what is left gives the first one more each."""
    counts = range(needs.sizes.experts, 0, -1)
    slots = next((s for s in map(needs.equal, counts) if needs.fit(s, room)), needs.equal(0))
    if needs.is_split(slots):
        for layer in range(len(slots)):
            more = (*slots[:layer], slots[layer] + 1, *slots[layer + 1 :])
            if needs.fit(more, room):
                slots = more
    return slots


def without_first(needs: Needs, room: Room, count: int) -> tuple[int, ...]:
    """All experts but those of the first `count` blocks; none if even without any it is too much.

    Raises `BudgetError` where the experts of more blocks have to stay off the device.
    """

    def slots_without(n: int) -> tuple[int, ...]:
        return tuple(0 if block < n else needs.sizes.experts for block in needs.sizes.blocks)

    slots = slots_without(count)
    if needs.fit(slots, room):
        return slots
    if not needs.fit(needs.equal(0), room):
        return needs.equal(0)
    more = range(count + 1, needs.geometry.layers + 1)
    least = next(n for n in more if needs.fit(slots_without(n), room))
    needed = needs.total(slots, needs.plan.context)
    raise BudgetError(
        f"with n_cpu_moe {count} the model needs {format_size(needed)} of GPU memory with a "
        f"context of {needs.plan.context} tokens and the budget is "
        f"{format_size(room.budget(split=needs.is_split(slots)))}: {least} would fit "
        f"(--n-cpu-moe {least}); without the option, each layer has as many experts there as fit"
    )


def what_would_fit(needs: Needs, slots: tuple[int, ...], room: Room, gpu: Gpu) -> str:
    """The message of a `BudgetError` where `slots` do not fit."""
    budget = room.budget(split=needs.is_split(slots))
    without = " and no experts there" if slots and not any(slots) else ""
    text = (
        f"the model needs {format_size(needs.total(slots, needs.plan.context))} of GPU memory with "
        f"a context of {needs.plan.context} tokens{without}, and the budget is "
        f"{format_size(max(budget, 0))} on {gpu.name}: "
    )
    low, high = 0, needs.plan.context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs.fit(slots, room, middle) else (low, middle)
    if low:
        return text + f"a context of {low} tokens would fit (--context {low})"
    more = "--vram" if budget == room.vram else "--ram"
    return text + (
        f"even a context of 1 token needs {format_size(needs.total(slots, 1))}; free memory of the "
        f"GPU, give more with {more}, or use --device cpu"
    )

"""What a training run takes of a device, and how it is made to fit: planned before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from localds.finetune.config import EXPERTS
from localds.finetune.groups import name_targets
from localds.finetune.sizes import Micro, train_sizes
from localds.memory.plan import BudgetError
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localds.finetune.config import AdapterConfig
    from localds.finetune.sizes import TrainSizes
    from localds.gguf import GGUFFile
    from localds.memory.gpu_sizes import DeviceBytes
    from localds.models.geometry import Geometry
    from localds.ops.mlx_device import Gpu

_SHORTEST, _LOWEST_RANK = 128, 4
_MANY_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run is to be: `batch` rows of `length` positions in a step, trained by `config`.

    `checkpointing` None leaves it to the plan, and so does `rows`, those of a micro-batch.
    """

    config: AdapterConfig
    length: int
    batch: int
    optimizer: str = "adamw"
    checkpointing: bool | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What lies on a device while a model is trained. Sizes in bytes.

    `rows` of `length` positions are computed at once, `accumulation` times in a step. Of each
    layer with experts, in order, `slots` of its `experts` lie on the device, and one takes
    `expert_bytes`; the others come from RAM or the disk through `staging` whenever a layer needs
    them. `peak` is what the largest of a layer's gradient, the logits, and the optimizer's change
    of a tensor takes for itself. `unified` memory is the machine's own.
    """

    gpu: str
    unified: bool
    budget: int | None
    length: int
    rows: int
    accumulation: int
    checkpointing: bool
    slots: tuple[int, ...]
    experts: int
    expert_bytes: tuple[int, ...]
    trunk: int
    staging: int
    adapters: int
    gradients: int
    moments: int
    kept: int
    peak: int
    runtime: int

    @property
    def resident(self) -> bool:
        """Whether all experts lie on the device."""
        return all(count == self.experts for count in self.slots)

    @property
    def pool(self) -> int:
        """Bytes of the experts on the device."""
        return sum(n * b for n, b in zip(self.slots, self.expert_bytes, strict=True))

    @property
    def parts(self) -> dict[str, int]:
        """What takes how much, by what to call it."""
        return {
            "weights but the experts": self.trunk,
            "experts": self.pool,
            "experts on their way": self.staging,
            "adapters": self.adapters,
            "gradients": self.gradients,
            "optimizer": self.moments,
            "inputs of layers" if self.checkpointing else "activations": self.kept,
            "one layer at work": self.peak,
            "runtime": self.runtime,
        }

    @property
    def total(self) -> int:
        """Bytes at the highest."""
        return sum(self.parts.values())


def plan_training(
    gguf: GGUFFile,
    geometry: Geometry,
    gpu: Gpu,
    budget: int | None,
    wanted: Wanted,
    *,
    device_bytes: DeviceBytes,
) -> TrainPlan:
    """Decide how a run fits into `budget` bytes of `gpu`; None for as many as it takes.

    As many rows are computed at once as fit, without checkpointing where there is room for that.
    Some experts stay off the device only where not even one row fits beside all of them.
    `device_bytes(type, bytes in the file)` tells what weights take there. Raises `BudgetError`
    that names what would fit, `ValueError` where the model has none of the targets.
    """
    sizes = train_sizes(gguf, geometry, gpu, device_bytes, wanted.config)
    found = _fitting(sizes, gpu, budget, wanted)
    if found is not None:
        return found

    def fits(changed: Wanted) -> bool:
        other = train_sizes(gguf, geometry, gpu, device_bytes, changed.config)
        return _fitting(other, gpu, budget, changed) is not None

    assert budget is not None  # noqa: S101  everything fits where there is none

    def least(run: Wanted) -> TrainPlan:
        other = train_sizes(gguf, geometry, gpu, device_bytes, run.config)
        return _make(other, gpu, budget, _least(run), (0,) * len(other.device.blocks))

    text = (
        f"training needs {format_size(least(wanted).total)} of {gpu.name} with rows of "
        f"{wanted.length} tokens and rank {wanted.config.rank}, and the budget is "
        f"{format_size(budget)}"
    )
    remedies: dict[str, str] = {}
    for run in filter(fits, _smaller(wanted)):
        option, remedy = _difference(run, wanted)
        remedies.setdefault(option, remedy)
    if remedies:
        raise BudgetError(f"{text}: {', or '.join(remedies.values())} would fit")
    smallest = least(_smallest(wanted))
    raise BudgetError(
        f"{text}; even with --length {smallest.length} and rank {_LOWEST_RANK} it would be "
        f"{format_size(smallest.total)}: give more memory (--vram, on the CPU --ram), or train a "
        "smaller model"
        if smallest.total > budget
        else f"{text}: several of --length, --rank, --targets have to be smaller, with --length "
        f"{smallest.length} and --rank {_LOWEST_RANK} it would fit"
    )


def _fitting(sizes: TrainSizes, gpu: Gpu, budget: int | None, wanted: Wanted) -> TrainPlan | None:
    whole = (sizes.device.experts,) * len(sizes.device.blocks)
    none = (0,) * len(whole)
    for slots in dict.fromkeys((whole, none)):
        for way in _ways(wanted, offloaded=slots != whole):
            plan = _make(sizes, gpu, budget, way, slots)
            if budget is None or plan.total <= budget:
                return plan if slots == whole else _filled(plan)
    return None


def _ways(wanted: Wanted, *, offloaded: bool) -> Iterator[Wanted]:
    """The ways to compute a step, the fastest first.

    Computing layers again costs more than a micro-batch of half as many tokens, if these are many.
    Where experts are brought to the device, what checkpointing saves serves more of them there.
    """
    rows = [n for n in range(wanted.batch, 0, -1) if wanted.batch % n == 0]
    if wanted.rows is not None:
        rows = [wanted.rows]
    enough = [] if offloaded else [(n, False) for n in rows if n * wanted.length >= _MANY_TOKENS]
    ways = [*enough, *((n, again) for n in rows for again in (offloaded, not offloaded))]
    for n, checkpointing in dict.fromkeys(ways):
        if wanted.checkpointing in (None, checkpointing):
            yield replace(wanted, rows=n, checkpointing=checkpointing)


def _least(wanted: Wanted) -> Wanted:
    """The way that takes the least."""
    return replace(
        wanted,
        rows=wanted.rows or 1,
        checkpointing=True if wanted.checkpointing is None else wanted.checkpointing,
    )


def _make(
    sizes: TrainSizes, gpu: Gpu, budget: int | None, way: Wanted, slots: tuple[int, ...]
) -> TrainPlan:
    assert way.rows is not None and way.checkpointing is not None  # noqa: S101
    micro, checkpointing = Micro(way.rows, way.length), way.checkpointing
    resident = all(count == sizes.device.experts for count in slots)
    accumulation = way.batch // way.rows
    layer = sizes.layer(micro, checkpointing=checkpointing, resident=resident)
    return TrainPlan(
        gpu=gpu.name,
        unified=gpu.unified,
        budget=budget,
        length=way.length,
        rows=way.rows,
        accumulation=accumulation,
        checkpointing=checkpointing,
        slots=slots,
        experts=sizes.device.experts,
        expert_bytes=sizes.device.expert_bytes,
        trunk=sizes.device.trunk,
        staging=0 if resident else sizes.staging,
        adapters=sizes.adapters,
        gradients=sizes.gradients(accumulation),
        moments=sizes.moments(way.optimizer),
        kept=sizes.kept(micro, checkpointing=checkpointing, resident=resident),
        peak=max(layer, sizes.head(micro), sizes.update()),
        runtime=sizes.device.runtime,
    )


def _filled(plan: TrainPlan) -> TrainPlan:
    """The plan with as many experts on the device as there is room for."""
    assert plan.budget is not None  # noqa: S101
    left = plan.budget - plan.total
    count = min(left // max(sum(plan.expert_bytes), 1), plan.experts)
    slots = [count] * len(plan.slots)
    left -= count * sum(plan.expert_bytes)
    for layer, nbytes in enumerate(plan.expert_bytes):
        if count < plan.experts and nbytes <= left:
            slots[layer] += 1
            left -= nbytes
    if all(n == plan.experts for n in slots):  # then nothing would be on its way
        slots[-1] -= 1
    return replace(plan, slots=tuple(slots))


def _smaller(wanted: Wanted) -> Iterator[Wanted]:
    """Runs that take less: each differs from `wanted` in one thing, the nearest first."""
    length = wanted.length // 2
    while length >= _SHORTEST:
        yield replace(wanted, length=length)
        length //= 2
    rank = wanted.config.rank // 2
    while rank >= _LOWEST_RANK:
        yield replace(wanted, config=replace(wanted.config, rank=rank))
        rank //= 2
    if EXPERTS in wanted.config.targets and len(wanted.config.targets) > 1:
        others = tuple(target for target in wanted.config.targets if target != EXPERTS)
        yield replace(wanted, config=replace(wanted.config, targets=others))
    if wanted.optimizer == "adamw":
        yield replace(wanted, optimizer="adamw8bit")
    if wanted.checkpointing is False:
        yield replace(wanted, checkpointing=None)


def _smallest(wanted: Wanted) -> Wanted:
    """The run that takes the least and still is one."""
    targets = tuple(target for target in wanted.config.targets if target != EXPERTS)
    config = replace(
        wanted.config,
        rank=min(_LOWEST_RANK, wanted.config.rank),
        targets=targets or wanted.config.targets,
    )
    length = min(_SHORTEST, wanted.length)
    return replace(wanted, config=config, length=length, checkpointing=None)


def _difference(run: Wanted, wanted: Wanted) -> tuple[str, str]:
    """The option in which two runs differ, and how to give it."""
    if run.length != wanted.length:
        return "length", f"--length {run.length}"
    if run.config.rank != wanted.config.rank:
        return "rank", f"--rank {run.config.rank}"
    if run.config.targets != wanted.config.targets:
        return "targets", f"--targets {name_targets(run.config.targets)}"
    if run.optimizer != wanted.optimizer:
        return "optimizer", f"--optimizer {run.optimizer}"
    return "checkpointing", "leaving out --no-checkpointing"


def describe_plan(plan: TrainPlan) -> str:
    """What takes what, as a table, and how a step is computed."""
    lines = [f"Memory on {plan.gpu}" + _of_budget(plan)]
    lines += [f"  {part:<24}{format_size(size):>10}" for part, size in plan.parts.items() if size]
    lines.append(f"  {'total':<24}{format_size(plan.total):>10}")
    rows = "1 row" if plan.rows == 1 else f"{plan.rows} rows"
    times = f", {plan.accumulation} times in a step" if plan.accumulation > 1 else ""
    how = "with" if plan.checkpointing else "without"
    lines.append(f"{rows} of {plan.length} tokens at once{times}, {how} checkpointing")
    if not plan.resident:
        lines.append(
            f"{sum(plan.slots):,} of {len(plan.slots) * plan.experts:,} experts on the device, the "
            "others come from RAM or the disk for every layer"
        )
    return "\n".join(lines)


def _of_budget(plan: TrainPlan) -> str:
    return "" if plan.budget is None else f", of {format_size(plan.budget)}"

"""What of a model fits in this machine's memory, and how it would run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from localds.gguf import GGUFFile
from localds.memory.machine import budget_for, total_memory
from localds.memory.placement import place
from localds.memory.plan import BudgetError, estimate, make_plan
from localds.models import read_geometry
from localds.session import DEFAULT_CONTEXT
from localds.units import format_size

if TYPE_CHECKING:
    from localds.memory.placement import Placement
    from localds.memory.plan import Plan
    from localds.models.geometry import Geometry

FitKind = Literal["in memory", "from disk", "too large", "cannot run"]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model would run here, in a word or two and in a line."""

    kind: FitKind
    text: str


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a model would be loaded with.

    `context` in tokens, None for the default; `ram` is the limit as the user wrote it, None for
    what is free; `freed` are the bytes that a loaded model gives back before the next is loaded.
    """

    context: int | None = None
    ram: str | None = None
    freed: int = 0

    def budget(self) -> int | None:
        """Bytes that a model may take, None where nothing is known.

        Raises `ValueError` for a `ram` that is no size.
        """
        budget = budget_for(self.ram)
        return budget + self.freed if self.ram is None and budget is not None else budget


_speeds: dict[tuple[Path, Conditions], float] = {}


def fit_of_file(gguf: GGUFFile, geometry: Geometry, conditions: Conditions) -> Fit:
    """What the planner says about an opened model; the speed only if it was measured before."""
    plan = make_plan(gguf, geometry, conditions.context or DEFAULT_CONTEXT)
    budget = conditions.budget()
    try:
        placement = place(gguf, geometry, plan, budget)
    except BudgetError:
        return Fit("too large", _what_is_needed(gguf, geometry, plan, budget or 0))
    if placement.resident:
        return Fit("in memory", f"all in memory, {_of(placement.total, placement.budget)}")
    return Fit("from disk", _shared(placement, _speeds.get((gguf.path, conditions))))


def measure_speed(path: Path, conditions: Conditions) -> None:
    """Measure memory and disk, in two seconds; `fit_of_file` tells the speed from then on.

    Raises `GGUFError`, `BudgetError`, or `OSError` where the disk fails.
    """
    from localds.memory.report import placement_report

    with GGUFFile.open(path) as gguf:
        geometry = read_geometry(gguf)
        plan = make_plan(gguf, geometry, conditions.context or DEFAULT_CONTEXT)
        placement = place(gguf, geometry, plan, conditions.budget())
        report = placement_report(gguf, geometry, placement)
    if not placement.resident:
        _speeds[path, conditions] = report["expected_tokens_per_second"]


def fit_by_size(file_bytes: int, conditions: Conditions) -> Fit:
    """About what a model that is not here would take, by the size of its files alone."""
    wanted, budget, total = estimate(file_bytes), conditions.budget(), total_memory()
    if budget is None or wanted <= budget:
        return Fit("in memory", f"all in memory, about {_of(wanted, budget)}")
    text = f"wants about {format_size(wanted)}, more than {format_size(budget)}: "
    if conditions.ram is None and total is not None and wanted <= total:
        return Fit("from disk", text + "experts from disk, unless other programs end")
    return Fit("from disk", text + "experts from disk, at the speed of the disk")


def _shared(placement: Placement, speed: float | None) -> str:
    """How a model runs whose experts are partly on disk."""
    share = 100 * min(placement.slots / placement.slots_total, 1)
    text = f"{share:.0f}% of the experts in memory, others from disk"
    return text if speed is None else f"{text}: at most {speed:.3g} tokens/s"


def _what_is_needed(gguf: GGUFFile, geometry: Geometry, plan: Plan, budget: int) -> str:
    """The least that a model takes, and the context with which it would fit."""
    pooled = place(gguf, geometry, plan, None, pooled=True)
    pool = pooled.least_slots * pooled.slot_bytes if pooled.slots_total else 0
    least = plan.trunk + pool + plan.cache + plan.runtime
    text = f"does not fit: needs at least {format_size(least)}"
    tokens = (budget - least + plan.cache) // plan.cache_per_token
    return f"{text}; a context of {tokens} tokens would fit" if tokens >= 1 else text


def _of(size: int, budget: int | None) -> str:
    """A size and what there is: "9.7 of 18.2 GiB"."""
    if budget is None:
        return format_size(size)
    part, whole = format_size(size), format_size(budget)
    number, unit = part.split()
    return f"{number if whole.endswith(f' {unit}') else part} of {whole}"

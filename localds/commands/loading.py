"""Loading a model for a command: progress, and what lies where if not all of it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localds.commands.common import say
from localds.commands.progress import show_percent

if TYPE_CHECKING:
    from pathlib import Path

    from localds.memory.placement import Placement
    from localds.model import Model


def load_model(path: str | Path, **options: Any) -> Model:
    """`localds.load`; tells of experts that stay on disk."""
    from localds.model import load

    model = load(path, on_progress=show_percent("Reading weights:"), **options)
    if not model.placement.resident:
        say(placement_line(model.placement))
    return model


def placement_line(placement: Placement) -> str:
    """What lies in memory, in one line."""
    from localds.units import format_size

    return (
        f"localds: {format_size(placement.plan.total)} do not fit in "
        f"{format_size(placement.budget or 0)}: {placement.slots} of {placement.slots_total} "
        f"experts at a time in memory ({format_size(placement.pool)}), the others on disk"
    )

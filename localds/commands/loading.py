"""Loading a model for a command: progress, and what lies where if not all of it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localds.commands.common import say
from localds.commands.progress import show_percent

if TYPE_CHECKING:
    from pathlib import Path

    from localds.model import Model


def load_model(path: str | Path, **options: Any) -> Model:
    """`localds.load`; tells of experts that stay on disk."""
    from localds.memory.placement import describe
    from localds.model import load

    model = load(path, on_progress=show_percent("Reading weights:"), **options)
    if not model.placement.resident:
        say(f"localds: {describe(model.placement)}")
    return model

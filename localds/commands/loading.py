"""Loading a model for a command: progress, and what lies where if not all of it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localds.commands.common import say
from localds.commands.progress import show_percent

if TYPE_CHECKING:
    from pathlib import Path

    from localds.model import Model


def load_model(path: str | Path, **options: Any) -> Model:
    """`localds.load`; tells what lies on a GPU, and of experts that stay on disk."""
    from localds.memory.gpu_plan import describe_gpu
    from localds.memory.placement import describe
    from localds.model import load

    model = load(
        path,
        on_progress=show_percent("Reading weights:"),
        on_note=lambda note: say(f"localds: {note}"),
        **options,
    )
    lines = list(model.notes)
    lines += [f"adapter {name}, scale {scale:g}" for name, scale in model.adapters]
    if model.on_gpu is not None:
        lines.append(describe_gpu(model.on_gpu.placement))
    if not model.placement.resident and not (model.on_gpu and model.on_gpu.gpu.unified):
        lines.append(describe(model.placement))
    for line in lines:
        say(f"localds: {line}")
    return model

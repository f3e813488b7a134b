"""TensorBoard's event files, by tensorboardX."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

from localds.finetune.loop.errors import TrainingError
from localds.finetune.loop.events import Evaluated, StepDone

if TYPE_CHECKING:
    from pathlib import Path

    from localds.finetune.loop.events import Event

_OF_A_STEP = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory")
_OF_AN_EVALUATION = ("loss", "perplexity")


def find_tensorboardx() -> Any:
    """The module. Raises `TrainingError` where it is not installed."""
    try:
        return import_module("tensorboardX")
    except ImportError as error:
        raise TrainingError(
            "TensorBoard logs were asked for and tensorboardX is not installed; "
            "pip install tensorboardX, or train without them"
        ) from error


class Board:
    """Event files in a folder; those of steps that a resumed run repeats are replaced."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = find_tensorboardx().SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, event: Event) -> None:
        """Add the figures of a step or of an evaluation."""
        figures = asdict(event)
        if isinstance(event, StepDone):
            scalars = {f"train/{name}": figures[name] for name in _OF_A_STEP}
            scalars |= {f"balance/{name}": value for name, value in event.balance.items()}
        elif isinstance(event, Evaluated):
            scalars = {f"evaluation/{name}": figures[name] for name in _OF_AN_EVALUATION}
        else:
            return
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()

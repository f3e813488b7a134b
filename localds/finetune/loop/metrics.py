"""The figures of a run as JSON lines, each once, however often the run was interrupted."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from localds.finetune.loop.events import Evaluated, Skipped, StepDone
from localds.gguf.write import replaced

if TYPE_CHECKING:
    from pathlib import Path

    from localds.finetune.loop.events import Event

_KINDS: dict[type, str] = {StepDone: "step", Skipped: "skipped", Evaluated: "evaluated"}


class MetricsLog:
    """`metrics.jsonl` in a run's folder: an object with "event" and the event's fields a line."""

    def __init__(self, path: Path, step: int, evaluated_step: int | None) -> None:
        """Open the log of a run that goes on after `step` steps; lines of later ones are dropped.

        Evaluations are kept up to the last that the run remembers.
        """
        last_evaluated = -1 if evaluated_step is None else evaluated_step
        kept = [
            line
            for line in read_metrics(path)
            if line["step"] <= (last_evaluated if line["event"] == "evaluated" else step)
        ]
        with replaced(path) as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self._stream: IO[str] = path.open("a", encoding="utf-8")

    def write(self, event: Event) -> None:
        """Append an event, if it is of a kind that is logged."""
        kind = _KINDS.get(type(event))
        if kind is not None:
            line = {"event": kind, **_finite(asdict(event))}
            self._stream.write(json.dumps(line, allow_nan=False) + "\n")
            self._stream.flush()

    def sync(self) -> None:
        """Make all lines last through a loss of power."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without one that was cut off as it was written."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _finite(value: Any) -> Any:
    """JSON has no infinities: they are written as words."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

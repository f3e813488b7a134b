"""What a measurement prints, and its figures as lines of JSON."""

from __future__ import annotations

import json
import statistics
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Value = float | str | bool


class Report:
    """Figures of one step. They are written at once: whoever is killed leaves what it has."""

    def __init__(self, step: str, file: Path | None) -> None:
        self.step = step
        self.failed = False
        self._file = file

    def say(self, text: str) -> None:
        print(text, flush=True)

    def figure(
        self,
        what: str,
        value: Value | Sequence[float],
        unit: str = "",
        note: str = "",
        *,
        detail: bool = False,
    ) -> None:
        """One figure; of several samples, their median. Tables leave out a `detail`."""
        samples = [] if isinstance(value, float | int | str) else [float(one) for one in value]
        record: dict[str, Any] = {"step": self.step, "what": what}
        record |= {"value": statistics.median(samples) if samples else value, "unit": unit}
        record |= {"samples": samples} if len(samples) > 1 else {}
        record |= {"note": note} if note else {}
        record |= {"detail": True} if detail else {}
        self.say(f"{what}: {told(record)}{f'; {note}' if note else ''}")
        if self._file is not None:
            with self._file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")

    def guarded(self, what: str, work: Callable[[], Any]) -> None:
        """Do it; a failure is told, and does not end the rest."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.fail(what, f"{type(error).__name__}: {str(error)[:300]}")

    def fail(self, what: str, why: str) -> None:
        self.failed = True
        self.figure(what, f"FAILED: {why}")


def told(record: dict[str, Any]) -> str:
    """A figure with its unit and samples."""
    text = " ".join(filter(None, [digits(record["value"]), record["unit"]]))
    samples = ", ".join(map(digits, record.get("samples", ())))
    return f"{text} ({samples})" if samples else text


def digits(value: Value) -> str:
    """Three of them, or all before the point."""
    if isinstance(value, str | bool):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

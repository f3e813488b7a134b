"""What is wrong with the data, told all at once before training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN = 20


class DataError(ValueError):
    """Data that cannot be trained on; the message lists what is wrong, with file and line."""


class RecordError(ValueError):
    """What is wrong with one record. The caller knows its file and line."""


class Problems:
    """Collects what is wrong with records: the first ones in words, the others as a number."""

    def __init__(self) -> None:
        self.count = 0
        self._lines: list[str] = []

    def add(self, path: Path, line: int | None, message: object) -> None:
        """Note one; `line` is None where a whole file is meant."""
        self.count += 1
        if len(self._lines) < _SHOWN:
            where = f"{path}" if line is None else f"{path}:{line}"
            self._lines.append(f"  {where}: {message}")

    def check(self) -> None:
        """Raise `DataError` if there are any."""
        if not self.count:
            return
        more = self.count - len(self._lines)
        lines = [*self._lines, *([f"  and {more:,} more"] if more else [])]
        what = "1 problem" if self.count == 1 else f"{self.count:,} problems"
        raise DataError("\n".join([f"{what} in the data; mend or remove these first:", *lines]))

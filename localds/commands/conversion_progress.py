"""Progress of a conversion: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from convert import Progress

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from convert.source import Target

_LINE_SECONDS = 30


class ConversionProgress(Progress):
    """Shows the tensor at work, bytes of the source a second, and the time left."""

    def __init__(self, title: str = "Converting") -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}"),
            console=console,
            disable=not self._terminal,
            transient=True,
            speed_estimate_period=60,
        )
        self._task = self._bar.add_task(title, total=None, tensor="")
        self._title = title
        self._done = self._total = 0.0
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Clear the bar."""
        self._bar.stop()

    def note(self, line: str) -> None:
        """Print one line above the bar."""
        if self._terminal:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(line, err=True)

    def begin(self, total: int, done: int) -> None:
        """Take the bytes of the source, and how many of them an earlier attempt dealt with."""
        self._total, self._done = total, done
        self._bar.update(self._task, total=total, completed=done)

    def advance(self, target: Target, size: float) -> None:
        """Take `size` bytes of the source as dealt with; they belong to `target`."""
        self._done += size
        self._bar.update(self._task, advance=size, tensor=target.name)
        if not self._terminal and time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            share = 100 * self._done / max(self._total, 1)
            typer.echo(f"{self._title}: {share:.0f}%, {target.name}", err=True)

"""Progress of a download: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from localds.commands.common import say
from localds.hub.transfer import Watch
from localds.units import format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_LINE_SECONDS = 30


class TransferProgress(Watch):
    """Shows what has come, bytes a second and the time left; above it, what is being checked."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._terminal,
            transient=True,
            speed_estimate_period=30,
        )
        self._check = self._bar.add_task("Checking", visible=False)
        self._task = self._bar.add_task("Downloading", visible=False)
        self._total = self._done = self._here = 0
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, total: int, done: int) -> None:
        """Show a bar over `total` bytes."""
        self._total, self._done, self._here = total, done, done
        self._started = self._told = time.monotonic()
        self._bar.update(self._task, total=total, completed=done, visible=done < total)

    def advance(self, size: int) -> None:
        """Move the bar, or tell how far it is."""
        self._done += size
        self._bar.update(self._task, completed=self._done, visible=self._done < self._total)
        if not self._terminal and time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            say(self._line())

    def check(self, name: str, size: int) -> None:
        """Show a second bar over the bytes that are checked."""
        if self._terminal:
            self._bar.reset(self._check, total=size, visible=True)
        else:
            say(f"Checking the {format_size(size)} of {name} that are here")

    def checked(self, size: int) -> None:
        """Move the second bar, which goes when it is full."""
        self._bar.advance(self._check, size)
        if self._bar.tasks[0].finished:
            self._bar.update(self._check, visible=False)

    def note(self, line: str) -> None:
        """Print one line above the bar."""
        if self._terminal:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line)

    def _line(self) -> str:
        share = 100 * self._done / max(self._total, 1)
        speed = max(self._done - self._here, 0) / max(time.monotonic() - self._started, 1e-9)
        left = f", {(self._total - self._done) / speed / 60:.0f} min left" if speed else ""
        return f"Downloading: {share:.0f}%, {format_size(speed)}/s{left}"

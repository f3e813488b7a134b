"""Progress on a terminal's last line: of work on tokens, or a bare percentage."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Advance(Protocol):
    """Counts `tokens` more as done; `note` is shown beside them."""

    def __call__(self, tokens: int, note: str = "") -> None:  # noqa: D102
        ...


def show_percent(title: str) -> Callable[[int, int], None] | None:
    """What shows "TITLE 12%" for (done, total) on stderr; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{title} {100 * done // total}%{end}", end="", file=sys.stderr, flush=True)

    return show


@contextmanager
def token_progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar over `total` tokens, their speed and the time left, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None)
            return Text("" if speed is None else f"{speed:.0f} tokens/s")

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        speed_estimate_period=300,
    )
    with bar:
        task = bar.add_task(title, total=total, note="")

        def advance(tokens: int, note: str = "") -> None:
            bar.update(task, advance=tokens, note=note)

        yield advance

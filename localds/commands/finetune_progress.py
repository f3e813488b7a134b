"""Progress of training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from localds.finetune.loop import Evaluated, Note, Progress, Resumed, Saved, Skipped, StepDone
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from localds.finetune.loop import Event

_LINE_SECONDS = 10.0


@contextmanager
def preparing() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far the data are checked and encoded, where stderr is a terminal."""
    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("The data", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{what.capitalize()} data", completed=done, total=total)

        yield show


class TrainingProgress:
    """Shows steps with loss, speed, memory and time left; evaluations and notes stay as lines."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self._terminal,
            transient=True,
        )
        self._task = self._bar.add_task("Training", total=None, figures="")
        self._told = time.monotonic() - _LINE_SECONDS

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

    def show(self, event: Event) -> None:
        """Tell of what happened."""
        match event:
            case StepDone():
                self._step(event)
            case Progress():
                self._within(event)
            case Evaluated():
                best = ", the best so far" if event.best else ""
                self._line(
                    f"step {event.step}: held-out loss {event.loss:.4f}, perplexity "
                    f"{event.perplexity:.4g}{best}"
                )
            case Skipped():
                self._line(f"step {event.step} was skipped: {event.reason}")
            case Resumed():
                self._line(f"going on after step {event.step}, from {event.path}")
            case Note():
                self._line(event.text)
            case Saved():
                self._bar.update(self._task, description=f"Saved step {event.step}")

    def _step(self, event: StepDone) -> None:
        balance = "".join(f", {name} {value:.3g}" for name, value in event.balance.items())
        figures = (
            f"step {event.step}/{event.steps}, loss {event.loss:.4f}, "
            f"{event.tokens_per_second:.0f} tokens/s, {format_size(event.peak_memory)}, "
            f"{_duration(event.seconds_left)} left"
        )
        self._bar.update(
            self._task,
            description="Training",
            total=event.steps,
            completed=event.step,
            figures=figures,
        )
        due = time.monotonic() - self._told >= _LINE_SECONDS
        if not self._terminal and (due or event.step == event.steps):
            self._told = time.monotonic()
            typer.echo(f"{figures}, rate {event.lr:.3g}{balance}", err=True)

    def _within(self, event: Progress) -> None:
        if event.doing == "evaluation":
            self._bar.update(self._task, description=f"Evaluating {event.done}/{event.total}")
        elif event.total > 1:
            self._bar.update(self._task, description=f"Training {event.done}/{event.total}")

    def _line(self, text: str) -> None:
        if self._terminal:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(text, err=True)


def _duration(seconds: float) -> str:
    """A time as people say it: "2 h 05 min", "40 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"

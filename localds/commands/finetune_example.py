"""`localds finetune --example`: the built-in model learns a format; answers before and after."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from localds.catalog.resolve import DEMO
from localds.commands.common import say
from localds.commands.finetune_progress import TrainingProgress
from localds.finetune.example import ask, prepare_example, questions, share_right

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN = 4


def run_example(output: Path, *, resume: bool) -> None:
    """Ask, train into `output`, and ask again.

    Raises what training raises, and `KeyboardInterrupt` where it was interrupted.
    """
    started = time.monotonic()
    job = prepare_example(output, resume=resume)
    before = ask(None)
    say(
        "The built-in model is to answer with JSON where the system prompt is "
        f'"{questions()[0].system}". {job.report.examples} examples teach it in {job.steps} steps:'
    )
    with TrainingProgress() as progress:
        finished = job.run(progress.show)
    if finished.reason == "interrupted":
        raise KeyboardInterrupt
    for note in finished.written.notes if finished.written else ():
        say(f"localds: {note}")
    after = ask(output)
    for number in range(0, len(before), len(before) // _SHOWN):
        typer.echo(f"\n{questions()[number].text}")
        typer.echo(f"  before: {before[number]}\n  after:  {after[number]}")
    typer.echo(
        f"\n{len(before)} questions that it was not trained on: {100 * share_right(before):.0f}% "
        f"exactly right before, {100 * share_right(after):.0f}% after "
        f"({time.monotonic() - started:.0f} s)"
    )
    typer.echo(f"{output}: the adapter; loss curve: {finished.curve or 'needs matplotlib'}")
    typer.echo(f"use it: localds chat {DEMO} --adapter {output} --system '{questions()[0].system}'")

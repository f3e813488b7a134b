"""`localds doctor`: what the machine has, what of it localds uses, and what to mend."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from localds.commands.common import clear_errors, say


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has, how fast it is, and what of it localds uses.

    Takes some seconds. Writes 256 MiB to the folder of models for a moment, to measure the disk.
    Exits with status 1 where there is something to mend; to have no GPU is no problem.
    """
    with clear_errors():
        from localds.commands.doctor_report import examine, existing
        from localds.commands.doctor_speeds import measure
        from localds.commands.doctor_text import problem_lines, report_lines, speed_lines
        from localds.hub.cache import cache_root

        say("looking at the machine ...")
        report = examine()
        if not as_json:
            typer.echo("\n".join(report_lines(report)))
        say("measuring memory, disk and GPU: some seconds ...")
        speeds = measure(report.gpu, existing(cache_root()))
        if as_json:
            typer.echo(
                json.dumps(asdict(report) | {"speeds": asdict(speeds)}, indent=2, default=str)
            )
        else:
            typer.echo("\n".join([*speed_lines(speeds), *problem_lines(report)]))
    if report.problems:
        raise typer.Exit(1)

"""The `localds` program: dispatches to the commands and turns errors into one message."""

from __future__ import annotations

from typing import Annotated

import typer

from localds import __version__
from localds.commands import (
    bench,
    chat,
    convert,
    doctor,
    finetune,
    imatrix,
    inspect,
    pull,
    rm,
    trace,
)
from localds.commands import eval as evaluate
from localds.commands import list as listing

app = typer.Typer(
    name="localds",
    help="Run DeepSeek-family language models on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("list")(listing.list_models)
app.command("pull")(pull.pull)
app.command("rm")(rm.rm)
app.command("inspect")(inspect.inspect)
app.command("bench", cls=bench.ListOptions)(bench.bench)
app.command("convert")(convert.convert)
app.command("finetune")(finetune.finetune)
app.command("imatrix")(imatrix.imatrix)
app.command("trace")(trace.trace)
app.command("eval")(evaluate.evaluate)
app.command("doctor")(doctor.doctor)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"localds {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run DeepSeek-family language models on this machine."""


def main() -> None:
    """Entry point. Exits with 0, 1 (the work failed), 2 (wrong command line) or 130 (Ctrl-C)."""
    app()

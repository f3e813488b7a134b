"""`localds rm`: remove an installed model, after asking."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from localds.commands.common import clear_errors, say
from localds.units import format_size

if TYPE_CHECKING:
    from localds.catalog.installed import Installed
    from localds.catalog.remove import Removal


def rm(
    name: Annotated[str, typer.Argument(help="NAME[:QUANT], or owner/repository[:QUANT].")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove an installed model.

    Unfinished downloads of its repository go, too. What other snapshots in the Hugging Face cache
    use is kept.
    """
    with clear_errors():
        from localds.catalog.remove import plan_removal, remove

        repository, model = _find(name)
        removal = plan_removal(repository, model.variant if model else None)
        if not removal.files and not removal.parts:
            raise ValueError(f"{name}: it is not installed; `localds list` shows what is")
        what = _describe(model, removal)
        if not yes:
            _confirm(what)
        remove(removal)
        typer.echo(f"removed {what}")


def _find(name: str) -> tuple[str, Installed | None]:
    """The repository, and the model if it is installed."""
    from localds.catalog.installed import find_installed
    from localds.catalog.names import UnknownModelError, parse

    reference = parse(name)
    found = find_installed(reference)
    if len(found) > 1:
        raise UnknownModelError(
            f"{name}: several variants are installed; name one: "
            f"{', '.join(model.name for model in found)}"
        )
    return reference.repository, found[0] if found else None


def _describe(model: Installed | None, removal: Removal) -> str:
    parts = sum(part.stat().st_size for part in removal.parts)
    unfinished = f"unfinished downloads of {removal.repository}, {format_size(parts)}"
    if model is None:
        return unfinished
    what = f"{model.name}, {format_size(removal.size - parts)}"
    return f"{what}, and {unfinished}" if removal.parts else what


def _confirm(what: str) -> None:
    """Ask; end with status 1 where the answer is no."""
    if not (sys.stdin and sys.stdin.isatty()):
        raise ValueError(f"to remove {what}: there is no terminal to ask on; add --yes")
    if not typer.confirm(f"Remove {what}?"):
        say("nothing was removed")
        raise typer.Exit(1)

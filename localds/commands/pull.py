"""`localds pull`: download a model, or go on with a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from localds.commands.common import clear_errors, say
from localds.units import format_size

if TYPE_CHECKING:
    from localds.catalog.installed import Installed
    from localds.catalog.names import Reference
    from localds.catalog.pull import Pull


def pull(
    name: Annotated[
        str, typer.Argument(help="NAME[:QUANT] from `localds list`, or owner/repository[:QUANT].")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be downloaded and stop.")
    ] = False,
) -> None:
    """Download a model into the Hugging Face cache.

    A download that was cut off goes on where it stopped. HF_HOME, HF_TOKEN, HF_ENDPOINT and
    HF_HUB_OFFLINE work as for other tools of the hub.
    """
    with clear_errors():
        from localds.catalog.names import parse

        try:
            _pull(parse(name), dry_run)
        except KeyboardInterrupt:
            say("localds: stopped; the same command goes on where it was")
            raise typer.Exit(130) from None


def _pull(reference: Reference, dry_run: bool) -> None:
    from localds.catalog.pull import fetch, plan
    from localds.commands.transfer_progress import TransferProgress
    from localds.hub.errors import NoConnectionError

    try:
        wanted = plan(reference)
    except NoConnectionError as error:
        here = _installed(reference)
        if here is None:
            raise
        say(f"localds: {error}")
        _done(str(here.path), here.size, here.name)
        return
    if dry_run:
        typer.echo("\n".join(_plan_lines(wanted)))
        return
    if wanted.missing:
        say(_intention(wanted))
    for line in _memory_warning(wanted.size):
        say(line)
    with TransferProgress() as progress:
        path = fetch(wanted, progress)
    _done(str(path), wanted.size, _chat_name(reference, wanted))
    if reference.known and reference.known.notes:
        say(reference.known.notes)


def _installed(reference: Reference) -> Installed | None:
    """The model as the cache has it, where there is no doubt which one is meant."""
    from localds.catalog.installed import find_installed
    from localds.catalog.resolve import pick

    found = find_installed(reference)
    quant = reference.known_quant
    if quant is not None:  # not whatever quant is there, but the one that was to be downloaded
        found = [model for model in found if model.label == quant.name]
    return pick(found, reference) if found else None


def _done(path: str, size: int, name: str) -> None:
    typer.echo(f"{path}: {format_size(size)}; chat with it: localds chat {name}")


def _chat_name(reference: Reference, wanted: Pull) -> str:
    """The shortest that `localds chat` understands."""
    return str(reference) if reference.known or reference.quant else f"{reference}:{wanted.quant}"


def _intention(wanted: Pull) -> str:
    here = wanted.size - wanted.missing
    kept = f", {format_size(here)} of it are here" if here else ""
    return f"{wanted.listing.repository}: {wanted.quant}, {format_size(wanted.size)}{kept}"


def _memory_warning(size: int) -> list[str]:
    from localds.memory.machine import total_memory
    from localds.memory.plan import estimate

    total = total_memory()
    if total is None or estimate(size) <= total:
        return []
    return [
        f"localds: this model wants {format_size(estimate(size))} of memory, this machine has "
        f"{format_size(total)}: it will run at the speed of the disk, if at all; "
        "`localds list` shows smaller ones"
    ]


def _plan_lines(wanted: Pull) -> list[str]:
    """Every file with its size and what is here, where it goes, and the room there."""
    from localds.hub.cache import free_room

    lines = [f"{wanted.listing.repository}: {wanted.quant}, at {wanted.listing.commit}"]
    for piece in wanted.pieces:
        state = "is here" if not piece.missing else f"{format_size(piece.have)} are here"
        lines.append(
            f"  {piece.file.name}: {format_size(piece.file.size)}"
            f"{', ' + state if piece.have else ''}"
        )
    return [
        *lines,
        f"to download  {format_size(wanted.missing)} of {format_size(wanted.size)}",
        f"into         {wanted.folder}",
        f"free there   {format_size(free_room())}",
    ]

"""All that is known about one model of the picker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from localds.units import format_size
from tui.literal import literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tui.models_on_offer import Offer


def describe(offer: Offer) -> Table:
    """Facts and their names, in two columns."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, value in _facts(offer):
        if value:
            table.add_row(Text(name, style="bold"), Text(literal(value)))
    return table


def _facts(offer: Offer) -> Iterator[tuple[str, str]]:
    """Name and value, empty where it is not known; what decides first."""
    parameters = f"; {offer.parameters} parameters" if offer.parameters else ""
    yield "Model", offer.label + parameters
    yield "State", _state(offer)
    yield ("Problem" if offer.fit.kind == "cannot run" else "Memory"), offer.fit.text
    yield "Disk", offer.room or ""
    yield "License", offer.license
    yield "Context", f"{offer.context} tokens at most" if offer.context else ""
    yield "About", offer.notes
    yield "Name", offer.name if offer.repository else ""
    yield "From", offer.repository
    yield "File", str(offer.path or "")


def _state(offer: Offer) -> str:
    size = format_size(offer.size_bytes)
    if offer.state == "partly downloaded":
        share = 100 * offer.have // offer.size_bytes
        return f"partly downloaded: {share}%, {format_size(offer.have)} of {size}"
    text = _STATES.get(offer.state, offer.state) + (f", {size}" if offer.size_bytes else "")
    if not offer.stray_bytes:
        return text
    return (
        f"{text}; {format_size(offer.stray_bytes)} of an unfinished download from its repository "
        "are here, and are used if they are of this model"
    )


_STATES = {
    "file": "a file on this machine",
    "other kind": "of a kind that localds does not run",
}

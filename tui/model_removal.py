"""Removing what the picker shows from the cache, after a question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localds.units import format_size
from tui.unfinished import forget_download

if TYPE_CHECKING:
    from localds.catalog.remove import Removal
    from tui.models_on_offer import Offer


def plan_for(offer: Offer) -> Removal:
    """What belongs to `offer`, its files or what is unfinished.

    Raises `RemoveError` where it is not there any more, or cannot be found.
    """
    from localds.catalog.remove import RemoveError, plan_removal

    removal = plan_removal(offer.repository, offer.variant)
    if not removal.files and not removal.parts:
        raise RemoveError(f"{offer.name}: nothing of it is here, or another program downloads it")
    return removal


def question(offer: Offer, removal: Removal) -> str:
    """What to ask before."""
    files = f"Remove {offer.label}?" if removal.files else f"Remove what came of {offer.label}?"
    lines = [files, f"{format_size(removal.size)} will be free again."]
    if removal.parts and removal.files:
        lines.append(f"Unfinished downloads of {removal.repository} go with it.")
    elif removal.parts:
        lines.append(f"All unfinished downloads of {removal.repository} go.")
    return "\n".join(lines)


def carry_out(offer: Offer, removal: Removal) -> None:
    """Remove it. Raises `RemoveError` or `OSError` where that is not possible."""
    from localds.catalog.remove import remove

    remove(removal)
    forget_download(offer.name)

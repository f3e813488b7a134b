"""The table of models in the picker."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual import events
from textual.coordinate import Coordinate
from textual.message import Message
from textual.widgets import DataTable

from localds.units import format_size
from tui.literal import literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.models_on_offer import Offer

COMMANDS = "dxcs/"
"""Letters that are keys of the screen while the table has the focus."""

_MARK, _SIZE, _STATE, _FIT = 2, 9, 14, 10
_LEAST_TITLE, _MOST_QUANT = 12, 16
_SCROLLBAR = 1
_POINTER = "▸"


class OfferTable(DataTable[Text]):
    """One row a model. A click moves the cursor, a double click or Enter selects.

    Letters that are no keys of the screen are handed on as `Typed`, for the filter.
    """

    DEFAULT_CSS = """
    OfferTable {
        background: $surface;
        scrollbar-size-vertical: 1;
        overflow-x: hidden;
        & > .datatable--header { background: $surface; color: $text-muted; text-style: none; }
        & > .datatable--cursor { text-style: none; }
        &:focus > .datatable--cursor { text-style: bold; }
    }
    """

    class Typed(Message):
        """A letter, or None for backspace, that belongs into the filter."""

        def __init__(self, letter: str | None) -> None:
            super().__init__()
            self.letter = letter

    HEADINGS: ClassVar = ("Model", "Quant", "Size", "State", "Fits")

    def __init__(self) -> None:
        super().__init__(cursor_type="row", cell_padding=0)
        self._offers: list[Offer] = []
        self._current: str | None = None
        self._pointed = 0

    @property
    def offer(self) -> Offer | None:
        """The one under the cursor."""
        row = self.cursor_row
        return self._offers[row] if 0 <= row < len(self._offers) else None

    def show(self, offers: Sequence[Offer], current: str | None, choose: str | None) -> None:
        """Show `offers`, the one in use marked, with the cursor on the one named `choose`."""
        self._offers, self._current = list(offers), current
        self._fill(choose)

    def on_resize(self) -> None:
        """Give the titles the room there is."""
        self._fill(self.offer.name if self.offer else None)

    def watch_cursor_coordinate(self, old: Coordinate, new: Coordinate) -> None:
        """Point at the row under the cursor with a sign, too."""
        super().watch_cursor_coordinate(old, new)
        self._point()

    async def on_click(self, event: events.Click) -> None:
        """Move the cursor; select with the second click."""
        event.prevent_default()
        row = event.style.meta.get("row", -1)
        if not 0 <= row < len(self._offers):
            return
        self.move_cursor(row=row)
        if event.chain == 2:
            self.action_select_cursor()

    def on_key(self, event: events.Key) -> None:
        """Hand on what is typed for the filter."""
        letter = event.character if event.is_printable else None
        if event.key == "backspace" or (letter and letter not in COMMANDS):
            event.stop()
            event.prevent_default()
            self.post_message(self.Typed(letter))

    def action_cursor_up(self) -> None:
        """Move up, from the first row into the filter."""
        if self.cursor_row <= 0:
            self.screen.focus_previous()
        else:
            super().action_cursor_up()

    def _fill(self, choose: str | None) -> None:
        self.clear(columns=True)
        quant = min(max((cell_len(literal(o.quant)) for o in self._offers), default=5), _MOST_QUANT)
        quant = max(quant, 5) + 1
        fixed = _MARK + quant + _SIZE + 1 + _STATE + _FIT + _SCROLLBAR
        title = max(self.size.width - fixed, _LEAST_TITLE)
        widths = (_MARK, title, quant, _SIZE + 1, _STATE, _FIT)
        for heading, width in zip(("", *self.HEADINGS), widths, strict=True):
            right = heading == "Size"
            text = f"{heading:>{_SIZE}} " if right else heading
            self.add_column(Text(text), width=width)
        for offer in self._offers:
            self.add_row(*(Text(cell) for cell in self._cells(offer, title - 1, quant - 1)))
        names = [offer.name for offer in self._offers]
        self.move_cursor(row=names.index(choose) if choose in names else 0)
        self._point()

    def _cells(self, offer: Offer, title: int, quant: int) -> tuple[str, ...]:
        size = format_size(offer.size_bytes) if offer.size_bytes else ""
        in_use = self._current is not None and offer.is_called(self._current)
        return (
            "",
            _cut(offer.title, title),
            _cut(offer.quant, quant),
            f"{size:>{_SIZE}} ",
            "in use" if in_use else _state(offer),
            _fit(offer),
        )

    def _point(self) -> None:
        """Move the sign to the row under the cursor."""
        for row, sign in ((self._pointed, ""), (self.cursor_row, _POINTER)):
            if 0 <= row < self.row_count:
                self.update_cell_at(Coordinate(row, 0), Text(sign))
        self._pointed = self.cursor_row


def _state(offer: Offer) -> str:
    if offer.state == "partly downloaded":
        return f"{100 * offer.have // offer.size_bytes}% here"
    return offer.state


def _fit(offer: Offer) -> str:
    return "no room" if offer.room else offer.fit.kind


def _cut(text: str, width: int) -> str:
    """The text on one line, its end cut off where it is longer than `width` columns."""
    line = literal(text).replace("\n", " ")
    return line if cell_len(line) <= width else set_cell_size(line, width - 1) + "…"

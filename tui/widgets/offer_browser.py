"""The models on offer: a filter, the table of what it lets through, and the details of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from textual import on, work
from textual.containers import Container, VerticalScroll
from textual.message import Message
from textual.widgets import DataTable, Input, Static
from textual.worker import get_current_worker

from tui.models_on_offer import file_offer, offers
from tui.widgets.literal_editors import LiteralInput
from tui.widgets.offer_detail import describe
from tui.widgets.offer_table import OfferTable

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from tui.model_fit import Conditions
    from tui.models_on_offer import Offer

_QUOTES = " '\""  # which terminals put around a file that is dropped into them
_HINT = "Type to filter, or the path of a GGUF file"


class OfferBrowser(Container):
    """Lists the models, one of them under the cursor (`offer`).

    `current` is the one in use, by name or path.
    """

    DEFAULT_CSS = """
    OfferBrowser {
        & > LiteralInput { margin-bottom: 1; }
        & > .lists { height: 1fr; }
        & OfferTable { height: 1fr; min-height: 4; }
        & .detail {
            height: 8;
            border-top: solid $foreground 30%;
            scrollbar-size-vertical: 1;
            &:focus { border-top: heavy $primary; }
        }
    }
    """

    class Highlighted(Message):
        """Another model is under the cursor, or what is known about it changed."""

    class Chosen(Message):
        """Enter was pressed, or a row clicked twice."""

    @dataclass
    class Listed(Message):
        """The models were listed, or why they could not be."""

        offers: list[Offer]
        error: str = ""

    @dataclass
    class _FileFound(Message):
        """The GGUF file that the filter `text` names, None where it names none."""

        text: str
        offer: Offer | None

    def __init__(self, current: str | None, conditions: Conditions, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self._current = current
        self._conditions = conditions
        self._offers: list[Offer] = []
        self._file: Offer | None = None
        self._wanted = current

    def compose(self) -> ComposeResult:
        """Filter, table and details."""
        yield LiteralInput(placeholder=_HINT, select_on_focus=False)
        with Container(classes="lists"):
            yield OfferTable()
            with VerticalScroll(classes="detail"):
                yield Static(markup=False)

    @property
    def offer(self) -> Offer | None:
        """The model under the cursor."""
        return self._table.offer

    @property
    def typing(self) -> bool:
        """Whether the filter has the focus, so that letters go there."""
        return self._filter.has_focus

    @property
    def _table(self) -> OfferTable:
        return self.query_one(OfferTable)

    @property
    def _filter(self) -> Input:
        return self.query_one(LiteralInput)

    def focus_filter(self) -> None:
        """Go to the filter."""
        self._filter.focus()

    def focus_table(self) -> None:
        """Go to the table."""
        self._table.focus()

    def move(self, where: Literal["up", "down", "page_up", "page_down"]) -> None:
        """Move the cursor of the table, and leave the focus there."""
        table = self._table
        table.focus()
        match where:
            case "up":
                table.action_cursor_up()
            case "down":
                table.action_cursor_down()
            case "page_up":
                table.action_page_up()
            case "page_down":
                table.action_page_down()

    @work(thread=True, exclusive=True, group="offers")
    def look(self) -> None:
        """List the models anew; `Listed` tells when that is done."""
        worker = get_current_worker()
        try:
            found = self.Listed(offers(self._conditions))
        except (ValueError, OSError) as error:
            found = self.Listed([], str(error))
        if not worker.is_cancelled:
            self.post_message(found)

    @on(Listed)
    def _show_listed(self, event: Listed) -> None:
        self._offers = event.offers
        if self._file:
            self._look_for_file(self._filter.value)
        wanted, self._wanted = self._wanted, None
        self._show(next((o.name for o in self._offers if wanted and o.is_called(wanted)), None))

    @on(Input.Changed)
    def _filter_changed(self, event: Input.Changed) -> None:
        self._file = None
        if event.value.strip(_QUOTES).lower().endswith(".gguf"):
            self._look_for_file(event.value)
        self._show()

    @work(thread=True, exclusive=True, group="file")
    def _look_for_file(self, text: str) -> None:
        offer = None
        try:
            path = Path(text.strip(_QUOTES)).expanduser()
            if path.is_file():
                offer = file_offer(path, self._conditions)
        except (ValueError, OSError, RuntimeError):
            offer = None  # no path at all, or of a user that is not known
        self.post_message(self._FileFound(text, offer))

    @on(_FileFound)
    def _show_file(self, event: _FileFound) -> None:
        if event.text == self._filter.value:
            self._file = event.offer
            self._show(event.offer.name if event.offer else None)

    def _show(self, choose: str | None = None) -> None:
        """Fill the table with what the filter lets through, the cursor on `choose` or as it was."""
        words = self._filter.value.lower().split()
        shown = [offer for offer in self._offers if all(word in _text(offer) for word in words)]
        if self._file:
            shown.insert(0, self._file)
        kept = choose or (self.offer.name if self.offer else None)
        self._table.show(shown, self._current, kept)
        self._show_offer()

    @on(DataTable.RowHighlighted)
    def _show_offer(self) -> None:
        offer = self.offer
        nothing = "No model matches the filter." if self._offers else ""
        self.query_one(".detail > Static", Static).update(describe(offer) if offer else nothing)
        self.query_one(".detail", VerticalScroll).scroll_home(animate=False)
        self.post_message(self.Highlighted())

    @on(Input.Submitted)
    @on(DataTable.RowSelected)
    def _choose(self) -> None:
        self.post_message(self.Chosen())

    @on(OfferTable.Typed)
    def _type(self, event: OfferTable.Typed) -> None:
        field = self._filter
        field.focus()
        field.cursor_position = len(field.value)
        if event.letter is None:
            field.action_delete_left()
        else:
            field.insert_text_at_cursor(event.letter)


def _text(offer: Offer) -> str:
    """What the filter looks at."""
    return f"{offer.title} {offer.quant} {offer.name} {offer.repository} {offer.state}".lower()

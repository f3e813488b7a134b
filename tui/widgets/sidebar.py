"""The list of conversations: search, open, rename, delete and undo."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from tui.literal import literal
from tui.store.error import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.app import ComposeResult

    from tui.store.conversations import ConversationStore
    from tui.store.records import Conversation

_DATE_WIDTH = 6
_SEARCH_SECONDS = 0.15  # after the last key
_DAY = 86400


class Sidebar(Vertical):
    """Conversations, the newest first; the one on the screen is marked. `found` are those shown."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "rename", "Rename chat"),
        Binding("d,delete", "delete", "Delete chat", key_display="d"),
        Binding("u", "undo", "Undo delete"),
        Binding("slash", "search", "Search chats", key_display="/"),
        Binding("down", "to_list", "To the list", show=False),
    ]
    DEFAULT_CSS = """
    Sidebar {
        width: 32;
        background: $surface;
        & > Input, & > Input:focus {
            border: none; height: 1; padding: 0 1; margin: 0 0 1 0; background: $panel;
        }
        & > OptionList, & > OptionList:focus {
            border: none; height: 1fr; padding: 0; background: $surface;
            scrollbar-size-vertical: 1;
        }
    }
    """

    @dataclass
    class Opened(Message):
        """A conversation was chosen."""

        id: int

    @dataclass
    class RenameAsked(Message):
        """Another title is wanted."""

        id: int
        title: str

    @dataclass
    class DeleteAsked(Message):
        """A conversation is to go."""

        id: int

    class UndoAsked(Message):
        """The last deleted conversation is to come back."""

    @dataclass
    class Listed(Message):
        """The conversations that were found."""

        search: str
        found: Sequence[Conversation]
        error: str = ""

    def __init__(self, store: ConversationStore, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._store = store
        self.found: list[Conversation] = []
        self._current: int | None = None

    def compose(self) -> ComposeResult:
        """The search field above the list."""
        yield Input(placeholder="search chats", select_on_focus=True)
        yield OptionList(markup=False)

    def on_mount(self) -> None:
        """Show what there is."""
        self.look()

    def focus_list(self) -> None:
        """Let keys choose a conversation."""
        self.query_one(OptionList).focus()

    def show_current(self, id: int | None) -> None:  # noqa: A002
        """Mark the conversation on the screen."""
        if id != self._current:
            self._current = id
            self._show()

    @work(thread=True, exclusive=True, group="chats")
    def look(self) -> None:
        """Look for conversations anew."""
        search = self.query_one(Input).value.strip()
        try:
            found: Sequence[Conversation] = self._store.conversations(search)
            error = ""
        except StoreError as failure:
            found, error = (), str(failure)
        self.post_message(self.Listed(search, found, error))

    @on(Listed)
    def _listed(self, event: Listed) -> None:
        event.stop()
        if event.search != self.query_one(Input).value.strip():
            return
        if event.error:
            self.app.notify(event.error, severity="error", markup=False)
        if list(event.found) != self.found:
            self.found = list(event.found)
            self._show()

    def _show(self) -> None:
        options = self.query_one(OptionList)
        highlighted = options.highlighted
        before = options.get_option_at_index(highlighted).id if highlighted is not None else None
        options.clear_options()
        width = max(self.size.width - 2, 12)
        options.add_options(
            Option(_line(found, width, current=found.id == self._current), id=str(found.id))
            for found in self.found
        )
        if not self.found:
            nothing = "nothing found" if self.query_one(Input).value.strip() else "no chats yet"
            options.add_option(Option(Text(f"  {nothing}", "dim"), disabled=True))
        ids = [str(found.id) for found in self.found]
        wanted = before if before in ids else str(self._current)
        options.highlighted = ids.index(wanted) if wanted in ids else (0 if ids else None)

    def on_resize(self) -> None:
        """Titles are cut elsewhere."""
        self._show()

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        value = event.value
        self.set_timer(_SEARCH_SECONDS, lambda: self._look_for(value))

    def _look_for(self, value: str) -> None:
        if value == self.query_one(Input).value:
            self.look()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.focus_list()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Opened(int(event.option_id or 0)))

    def _chosen(self) -> Conversation | None:
        index = self.query_one(OptionList).highlighted
        return None if index is None or index >= len(self.found) else self.found[index]

    def action_rename(self) -> None:
        """Ask for another title."""
        if chosen := self._chosen():
            self.post_message(self.RenameAsked(chosen.id, chosen.title))

    def action_delete(self) -> None:
        """Remove a conversation."""
        if chosen := self._chosen():
            self.post_message(self.DeleteAsked(chosen.id))

    def action_undo(self) -> None:
        """Bring back the one deleted last."""
        self.post_message(self.UndoAsked())

    def action_search(self) -> None:
        """Go to the search field."""
        self.query_one(Input).focus()

    def action_to_list(self) -> None:
        """From the search field to the list."""
        self.focus_list()


def _line(conversation: Conversation, width: int, *, current: bool) -> Text:
    """Title and date of a conversation, `width` cells wide."""
    title = Text(("▸ " if current else "  ") + literal(conversation.title or "New chat"))
    title = Text(title.plain.replace("\n", " "))
    title.truncate(width - _DATE_WIDTH, overflow="ellipsis", pad=True)
    return title.append(_when(conversation.updated).rjust(_DATE_WIDTH), "dim")


def _when(moment: float) -> str:
    """The time of today, the day of this week, else the date."""
    then, now = time.localtime(moment), time.localtime()
    if then[:3] == now[:3]:
        return time.strftime("%H:%M", then)
    if time.time() - moment < 6 * _DAY:
        return time.strftime("%a", then)
    return time.strftime("%d %b" if then.tm_year == now.tm_year else "%Y", then)

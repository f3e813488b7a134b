"""The text of the message being written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.actions import SkipAction
from textual.content import Content

from tui.widgets.literal_editors import LiteralTextArea

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.document._document import Location
    from textual.dom import DOMNode
    from textual.events import Key, Paste
    from textual.geometry import Size

_MAX_LINES = 10


class PromptEditor(LiteralTextArea):
    """A text area that grows with its text up to 10 lines or a third of the screen.

    `owner` has the key bindings that come before the editor's own. `take_paste` says whether a
    pasted text went elsewhere.
    """

    DEFAULT_CSS = """
    PromptEditor {
        height: auto;
        min-height: 1;
        border: none;
        padding: 0 1;
        background: transparent;
        scrollbar-size-vertical: 1;
        &:focus { border: none; }
        & .text-area--placeholder { color: $text-muted; }
    }
    """

    def __init__(self, owner: DOMNode, take_paste: Callable[[str], bool], placeholder: str) -> None:
        super().__init__(highlight_cursor_line=False, placeholder=Content(placeholder))
        self._owner = owner
        self._take_paste = take_paste
        self.cursor_blink = False
        self.match_cursor_bracket = False  # It would search the whole text at each move.

    @property
    def line(self) -> str:
        """The line of the text that the cursor is in."""
        return self.document.get_line(self.cursor_location[0])

    @property
    def on_first_row(self) -> bool:
        """Whether the cursor is in the first row as it is drawn."""
        return self.wrapped_document.location_to_offset(self.cursor_location).y == 0

    @property
    def on_last_row(self) -> bool:
        """Whether the cursor is in the last row as it is drawn."""
        offset = self.wrapped_document.location_to_offset(self.cursor_location)
        return offset.y == self.wrapped_document.height - 1

    @property
    def at_beginning(self) -> bool:
        """Whether the cursor is at the very beginning, with nothing selected."""
        return self.selection.is_empty and self.cursor_location == (0, 0)

    @property
    def behind_backslash(self) -> bool:
        """Whether the cursor is at the end of a line that ends with a backslash."""
        at_end = self.cursor_location[1] == len(self.line)
        return self.selection.is_empty and at_end and self.line.endswith("\\")

    def write(self, text: str, start: Location, end: Location) -> None:
        """Put a text between two places, and the cursor behind it."""
        self.move_cursor(
            self.replace(text, start, end, maintain_selection_offset=False).end_location
        )

    def delete_at(self, index: int) -> None:
        """Delete one character by its index in the text."""
        before = self.text[:index]
        row, column = before.count("\n"), index - before.rfind("\n") - 1
        self.delete((row, column), (row, column + 1))

    def end_of_first_row(self) -> Location:
        """The last place of the cursor in the first row as it is drawn."""
        breaks = self.wrapped_document.get_offsets(0)
        return (0, breaks[0] - 1 if breaks else len(self.document.get_line(0)))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many rows as the text has, within bounds."""
        limit = max(1, min(_MAX_LINES, viewport.height // 3))
        return min(limit, super().get_content_height(container, viewport, width))

    async def _on_key(self, event: Key) -> None:
        # Textual runs bindings from the app's queue: there, keys typed ahead would be overtaken
        # by later letters, and Enter would send a text without its last ones.
        for node in (self._owner, self):
            for binding in node._bindings.key_to_bindings.get(event.key, ()):
                if await self.app.run_action(binding.action, node):
                    event.stop()
                    event.prevent_default()
                    return
        if self.read_only and event.is_printable:
            event.stop()

    async def _on_paste(self, event: Paste) -> None:
        event.stop()
        if self.read_only or self._take_paste(event.text):
            event.prevent_default()

    def action_paste(self) -> None:
        """Paste from the app's clipboard."""
        if not self.read_only and not self._take_paste(self.app.clipboard):
            super().action_paste()

    def action_cursor_page_up(self) -> None:
        """Scroll a page, where there is more than one; else the key is for others."""
        self._need_pages()
        super().action_cursor_page_up()

    def action_cursor_page_down(self) -> None:
        """Scroll a page, where there is more than one; else the key is for others."""
        self._need_pages()
        super().action_cursor_page_down()

    def _need_pages(self) -> None:
        if self.wrapped_document.height <= self.size.height:
            raise SkipAction

"""Editors that draw control characters as blocks, where Textual's would send them to the terminal.

The text itself stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.highlighter import Highlighter
from textual.widgets import Input, TextArea

from tui.literal import one_cell_each

if TYPE_CHECKING:
    from rich.text import Text


class _Blocks(Highlighter):
    def highlight(self, text: Text) -> None:
        text.plain = one_cell_each(text.plain)


class LiteralInput(Input):
    """An `Input` of one row."""

    DEFAULT_CSS = """
    LiteralInput {
        height: 1;
        border: none;
        border-left: vkey $border-blurred;
        padding: 0 1 0 0;
        background: $panel;
        &:focus { border: none; border-left: outer $border; background-tint: $foreground 8%; }
        &.-wrong { border: none; border-left: outer $error; }
        & > .input--placeholder { color: $text-muted; }
    }
    """

    def __init__(self, value: str = "", **options: Any) -> None:
        super().__init__(value, highlighter=_Blocks(), **options)


class LiteralTextArea(TextArea):
    """A `TextArea` for plain text; Tab leaves it."""

    DEFAULT_CSS = """
    LiteralTextArea {
        border: none;
        border-left: vkey $border-blurred;
        padding: 0 1 0 0;
        background: $panel;
        &:focus { border: none; border-left: outer $border; background-tint: $foreground 8%; }
        & .text-area--placeholder { color: $text-muted; }
    }
    """

    def get_line(self, line_index: int) -> Text:
        """The line as it is drawn."""
        line = super().get_line(line_index)
        line.plain = one_cell_each(line.plain)
        return line

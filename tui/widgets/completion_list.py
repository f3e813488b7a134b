"""A list of completions, above an input and over what is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len, set_cell_size
from textual.content import Content
from textual.message import Message
from textual.widget import Widget

if TYPE_CHECKING:
    from textual.events import Click, MouseScrollDown, MouseScrollUp

    from tui.completion import Candidate

ROWS = 8


class CompletionList(Widget, can_focus=False):
    """Shows candidates and which of them is chosen; the keys come from the input."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {"completions--chosen", "completions--detail"}
    DEFAULT_CSS = """
    CompletionList {
        overlay: screen;
        constrain: none inside;
        display: none;
        width: 1fr;
        background: $panel;
        color: $text;
        border: solid $border-blurred;
        border-bottom: none;
        border-title-align: right;
        border-title-color: $text-muted;
        border-title-background: $background;
        & .completions--detail { color: $text-muted; }
        & .completions--chosen {
            color: $block-cursor-foreground;
            background: $block-cursor-background;
            text-style: bold;
        }
    }
    """

    @dataclass
    class Clicked(Message):
        """A candidate was chosen with the mouse."""

        candidate: Candidate

    def __init__(self) -> None:
        super().__init__()
        self.candidates: tuple[Candidate, ...] = ()
        self.index: int | None = None
        self._more = False
        self._top = 0

    @property
    def is_open(self) -> bool:
        """Whether the list can be seen."""
        return bool(self.display)

    @property
    def chosen(self) -> Candidate | None:
        """The highlighted candidate."""
        return None if self.index is None else self.candidates[self.index]

    def open(self, candidates: tuple[Candidate, ...], index: int | None, *, more: bool) -> None:
        """Show candidates, one of them chosen or none; `more` where others were left out."""
        self.candidates, self.index, self._more = candidates, index, more
        self.display = True
        self._top = 0
        self._place(min(len(candidates), ROWS) + 1)
        self._scroll()

    def close(self) -> None:
        """Hide the list."""
        self.display = False

    def move(self, rows: int) -> None:
        """Choose the candidate so many rows further, from one end on at the other."""
        last = len(self.candidates) - 1
        if self.index is None:
            self.index = 0 if rows > 0 else last
        elif abs(rows) == 1:
            self.index = (self.index + rows) % (last + 1)
        else:
            self.index = min(max(self.index + rows, 0), last)
        self._scroll()

    def _place(self, height: int) -> None:
        """On top of the input, as wide as that, or below it where there is more room."""
        parent = self.parent
        assert isinstance(parent, Widget)  # noqa: S101
        region, gutter = parent.region, parent.gutter
        below = region.y < height <= self.screen.size.height - region.bottom
        self.styles.height = height
        self.styles.width = region.width
        self.styles.offset = (
            -gutter.left,
            region.height - gutter.top if below else -height - gutter.top,
        )

    def _scroll(self) -> None:
        """Bring the chosen row into view."""
        index = self.index or 0
        self._top = max(index - ROWS + 1, min(self._top, index))
        count = f"{len(self.candidates)}{'+' if self._more else ''}"
        place = "" if self.index is None else f"{self.index + 1} of "
        self.border_title = f"{place}{count}"
        self.refresh()

    def render(self) -> Content:
        """The rows in view, the chosen one with a sign."""
        width = self.content_size.width
        shown = self.candidates[self._top : self._top + ROWS]
        names = max((cell_len(c.shown) for c in self.candidates), default=0)
        names = min(names, max(8, width * 3 // 5))
        return Content("\n").join(
            self._row(candidate, self._top + row == self.index, names, width)
            for row, candidate in enumerate(shown)
        )

    def _row(self, candidate: Candidate, chosen: bool, names: int, width: int) -> Content:
        name = f"{'▸' if chosen else ' '} {_fitted(candidate.shown, names)}  "
        detail = _fitted(candidate.detail, max(0, width - cell_len(name)))
        if chosen:
            return Content.styled(name + detail, self.get_visual_style("completions--chosen"))
        return Content.assemble(name, (detail, self.get_visual_style("completions--detail")))

    async def _on_click(self, event: Click) -> None:
        event.stop()
        offset = event.get_content_offset(self)
        index = None if offset is None else self._top + offset.y
        if index is not None and index < len(self.candidates):
            self.post_message(self.Clicked(self.candidates[index]))

    def _on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self._wheel(event, 1)

    def _on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self._wheel(event, -1)

    def _wheel(self, event: MouseScrollDown | MouseScrollUp, rows: int) -> None:
        event.stop()
        event.prevent_default()
        self.move(rows)


def _fitted(text: str, width: int) -> str:
    """The text in exactly so many cells, with … where it was cut."""
    if cell_len(text) > width > 0:
        return set_cell_size(text, width - 1) + "…"
    return set_cell_size(text, width)

"""The conversation on the screen: one widget for all messages, which draws only what is seen.

A widget for every paragraph would make each new token cost more the longer the conversation is.
Here a frame of a streaming reply draws one block of Markdown and the lines in view, however much
lies above.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import Reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.markdown.paint import Colours, Painter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from textual import events
    from textual.selection import Selection

    from tui.widgets.entry import Entry

GUTTER = 2
WIDEST = 120
"""Longer lines are hard to read."""

_SLICE_SECONDS = 0.005  # to measure entries at a time while nothing else is to be done
_KEPT = 40  # entries whose lines are kept, around those in view


class Transcript(ScrollView, can_focus=True):
    """Messages, one of which may be selected. It follows the end while it is scrolled there."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "previous", "Message above", show=False),
        Binding("down,j", "next", "Message below", show=False),
        Binding("left,h", "branch(-1)", "Other version", show=False),
        Binding("right,l", "branch(1)", "Other version", show=False),
        Binding("c", "copy", "Copy"),
        Binding("1,2,3,4,5,6,7,8,9", "copy_code", "Copy code", key_display="1-9"),
        Binding("e", "ask('edit')", "Edit"),
        Binding("r", "ask('regenerate')", "Regenerate"),
        Binding("full_stop", "ask('continue')", "Continue", key_display="."),
        Binding("t,enter,space", "toggle_thinking", "Thinking", key_display="t"),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "to_top", "Beginning", show=False),
        Binding("end,G", "to_end", "End", show=False),
    ]
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "transcript--muted",
        "transcript--accent",
        "transcript--heading",
        "transcript--title",
        "transcript--code",
        "transcript--bar",
    }
    DEFAULT_CSS = """
    Transcript {
        scrollbar-size-vertical: 1;
        overflow-x: hidden;
        overflow-y: scroll;
        & > .transcript--muted { color: $text-muted; }
        & > .transcript--accent { color: $text-accent; }
        & > .transcript--heading { color: $text-primary; text-style: bold; }
        & > .transcript--title { color: $text-success; text-style: bold; }
        & > .transcript--code { background: $surface; }
        & > .transcript--bar { color: $primary; }
    }
    """

    # Unlike Textual's: the widget stays as large as it is however much it holds, so nothing has to
    # be laid out again, and of the screen nothing else drawn, when a reply grows by a line.
    virtual_size = Reactive(Size(0, 0), layout=False)

    @dataclass
    class Asked(Message):
        """The user wants something done with a message: edit, regenerate or continue it."""

        what: str
        entry: Entry

    @dataclass
    class BranchAsked(Message):
        """Show the version before (-1) or after (1) of a message."""

        step: int
        entry: Entry

    @dataclass
    class Copy(Message):
        """Put `text` on the clipboard; `what` it is, for a word to the user."""

        text: str
        what: str

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  Textual's name
        super().__init__(id=id)
        self.entries: list[Entry] = []
        self._tops: list[int] = [0]  # first line of each entry, and the end
        self._painter: Painter | None = None
        self._ground = Style()  # the background that all lines stand on
        self._selected: int | None = None
        self._following = True

    # What is shown

    def show(self, entries: Sequence[Entry]) -> None:
        """Show other messages, from their end."""
        self.entries = list(entries)
        self._selected = None
        self._following = True
        self.clear_selection()
        self._laid_out(0)

    def add(self, entry: Entry) -> None:
        """Show one message more, at the end."""
        self.entries.append(entry)
        self._following = True
        self._laid_out(len(self.entries) - 1)

    def changed(self, entry: Entry) -> None:
        """Draw a message again that has changed."""
        index = self._index(entry)
        if index is not None:
            self._laid_out(index)

    @property
    def painter(self) -> Painter:
        """Draws in this widget's width and colours."""
        if self._painter is None:
            width = min(self.scrollable_content_region.width - GUTTER - 1, WIDEST)
            self._painter = Painter(self._colours(), width)
            self._ground = Style(bgcolor=self.rich_style.bgcolor)
        return self._painter

    @property
    def selected(self) -> Entry | None:
        """The message that keys act on: the one selected, else the last one."""
        if not self.entries:
            return None
        return self.entries[-1 if self._selected is None else self._selected]

    def _index(self, entry: Entry) -> int | None:
        # Mostly it is the last one.
        indices = reversed(range(len(self.entries)))
        return next((i for i in indices if self.entries[i] is entry), None)

    def _colours(self) -> Colours:
        def style(name: str) -> Style:
            part = self.get_component_rich_style(f"transcript--{name}", partial=True)
            # Only the whole style knows what a colour such as "auto 68%" is on this background.
            whole = self.get_component_rich_style(f"transcript--{name}")
            return part + Style.from_color(whole.color)

        return Colours(
            text=Style.from_color(self.rich_style.color),
            muted=style("muted"),
            accent=style("accent"),
            heading=style("heading"),
            title=style("title"),
            code=style("code"),
            syntax="ansi_dark" if self.app.current_theme.dark else "ansi_light",
        )

    def _go_to(self, y: float) -> None:
        self.scroll_to(None, y, animate=False)

    # Where lines are

    def _laid_out(self, changed: int) -> None:
        """Entries from index `changed` on are new or have changed: find all lines' places again."""
        if not self.is_attached or not self.size.width:
            return
        end = self._tops[-1]
        with self._holding_view():
            self._measure_view()
        if changed == len(self.entries) - 1 and end <= self._tops[-1]:
            # The last message has grown: what it says above stays.
            first = self._tops[changed] + self.entries[changed].changed_from
            self.refresh_lines(first, self._tops[-1] - first)
        else:
            self.refresh()

    def _place(self) -> None:
        width = self.painter.width
        self._tops = [0, *accumulate(entry.height(width) for entry in self.entries)]
        self.virtual_size = Size(self.scrollable_content_region.width, self._tops[-1])
        self.vertical_scrollbar.window_virtual_size = self._tops[-1]
        self.vertical_scrollbar.window_size = self.size.height
        self.scroll_y = min(self.scroll_y, self.max_scroll_y)

    def _top_entry(self) -> tuple[int, int]:
        """The entry at the top of the view, and the line of it."""
        y = round(self.scroll_y)
        index = max(min(bisect_right(self._tops, y) - 1, len(self.entries) - 1), 0)
        return index, y - self._tops[min(index, len(self._tops) - 1)]

    @contextmanager
    def _holding_view(self) -> Iterator[None]:
        """Find lines' places after messages were measured; follow the end, or stay where it was.

        Heights above the view may have been guessed wrong.
        """
        top = self._top_entry()
        before = self._tops[top[0]] if top[0] < len(self._tops) else 0
        yield
        self._place()
        if self._following:
            self._go_to(self.max_scroll_y)
        elif top[0] < len(self._tops) and self._tops[top[0]] != before:
            self._go_to(min(self._tops[top[0]] + top[1], self.max_scroll_y))

    def _measure_view(self) -> None:
        """Draw what is in view, and a page above and below, so that its height is known."""
        width, page = self.painter.width, self.size.height
        if self._following:
            wanted, index = 2 * page, len(self.entries) - 1
            while index >= 0 and wanted > 0:
                wanted -= self._measure(index, width)
                index -= 1
            return
        index, line = self._top_entry()
        wanted = line + 2 * page
        for i in range(index, len(self.entries)):
            if wanted <= 0:
                break
            wanted -= self._measure(i, width)
        wanted = page
        for i in range(index - 1, -1, -1):
            if wanted <= 0:
                break
            wanted -= self._measure(i, width)

    def _measure(self, index: int, width: int) -> int:
        entry = self.entries[index]
        if not entry.is_measured():
            entry.lines(self.painter)
        return entry.height(width)

    def _measure_some(self) -> None:
        """Measure more, from the end on, while nobody waits for anything."""
        if not self.size.width or (self.entries and self.entries[-1].streaming):
            return
        unknown = [entry for entry in reversed(self.entries) if not entry.is_measured()]
        if not unknown:
            return
        started = perf_counter()
        with self._holding_view():
            for entry in unknown:
                entry.lines(self.painter)
                entry.release()
                if perf_counter() - started > _SLICE_SECONDS:
                    break

    def _release_far(self) -> None:
        index, _ = self._top_entry()
        for i, entry in enumerate(self.entries):
            if abs(i - index) > _KEPT:
                entry.release()

    # Events

    def on_mount(self) -> None:
        """Draw again in other colours, and measure what was not seen yet while idle."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._restyle())
        self.set_interval(0.05, self._measure_some)
        self.set_interval(10, self._release_far)

    def on_resize(self) -> None:
        """Lines break elsewhere."""
        self._restyle()

    def _restyle(self) -> None:
        top = self._top_entry()
        following = self._following
        self._painter = None
        for entry in self.entries:
            entry.restyle()
        if not self.size.width:
            return
        self._place()
        self._following = following
        if not following:
            self._go_to(self._tops[min(top[0], len(self._tops) - 1)])
        self._laid_out(0)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Follow the end again when it is scrolled to."""
        super().watch_scroll_y(old_value, new_value)
        self._following = new_value >= self.max_scroll_y
        if not self._following:
            self._measure_after_scroll()

    def _measure_after_scroll(self) -> None:
        first = self._top_entry()[0]
        end = bisect_right(self._tops, round(self.scroll_y) + self.size.height)
        if not all(entry.is_measured() for entry in self.entries[first:end]):
            with self._holding_view():
                self._measure_view()

    async def on_click(self, event: events.Click) -> None:
        """Select a message; fold or unfold what it thought."""
        y = event.y + round(self.scroll_y)
        index = bisect_right(self._tops, y) - 1
        if not 0 <= index < len(self.entries):
            return
        self._select(index, scroll=False)
        entry = self.entries[index]
        if entry.thinking_line is not None and y - self._tops[index] == entry.thinking_line:
            self.toggle_thinking(entry)

    # Drawing

    def render_line(self, y: int) -> Strip:
        """One line of the view."""
        y += round(self.scroll_y)
        width = self.scrollable_content_region.width
        index = bisect_right(self._tops, y) - 1
        if not 0 <= index < len(self.entries):
            return Strip.blank(width, self._ground)
        entry = self.entries[index]
        lines = entry.lines(self.painter)
        line = y - self._tops[index]
        strip = lines[line] if line < len(lines) else Strip.blank(0)
        strip = Strip.join([self._gutter(index, line < len(lines) - 1), strip])
        strip = strip.crop_extend(0, width, None)
        if (selection := self.text_selection) is not None:
            strip = self._highlighted(strip, selection.get_span(y))
        return strip.apply_style(self._ground).apply_offsets(0, y)

    def _gutter(self, index: int, inside: bool) -> Strip:
        if inside and index == self._selected and self.has_focus:
            style = self.get_component_rich_style("transcript--bar", partial=True)
            return Strip([Segment("▌ ", style)])
        return Strip([Segment(" " * GUTTER)])

    def _highlighted(self, strip: Strip, span: tuple[int, int] | None) -> Strip:
        if span is None:
            return strip
        start, end = span
        end = strip.cell_length if end == -1 else min(end, strip.cell_length)
        if start >= end:
            return strip
        style = self.screen.get_component_rich_style("screen--selection")
        before, chosen, after = (
            strip.crop(0, start),
            strip.crop(start, end),
            strip.crop(end, strip.cell_length),
        )
        chosen = Strip(Segment.apply_style(chosen, post_style=style))
        return Strip.join([before, chosen, after])

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that was marked with the mouse, without the gutter's blanks at the ends."""
        lines = []
        for entry in self.entries:
            height = entry.height(self.painter.width)
            drawn = entry.lines(self.painter) if entry.is_measured() else [Strip.blank(0)] * height
            lines += [" " * GUTTER + strip.text.rstrip() for strip in drawn]
        text = selection.extract("\n".join(lines))
        return "\n".join(line.removeprefix(" " * GUTTER) for line in text.split("\n")), "\n"

    def selection_updated(self, selection: Selection | None) -> None:  # noqa: ARG002
        """Draw what is marked."""
        self.refresh()

    def clear_selection(self) -> None:
        """Mark nothing: the lines are others now."""
        if self.is_attached:
            self.screen.clear_selection()

    # What keys do

    def _select(self, index: int, *, scroll: bool = True) -> None:
        self._selected = index
        self.refresh()
        if scroll:
            self._measure(index, self.painter.width)
            self._place()
            top, end = self._tops[index], self._tops[index + 1]
            if top < self.scroll_y or end > self.scroll_y + self.size.height:
                end_shown = end - self.size.height
                self._go_to(min(top, max(end_shown, top if top < self.scroll_y else 0)))

    def action_previous(self) -> None:
        """Select the message above, or scroll up in one that is longer than the view."""
        index = self._current()
        if index is None:
            return
        if self._selected is not None and self._tops[index] < self.scroll_y:
            self._go_to(max(self.scroll_y - 3, self._tops[index]))
        elif self._selected is None:
            self._select(index)
        elif index > 0:
            self._select(index - 1)
            self._go_to(max(self._tops[index] - self.size.height, self._tops[index - 1]))

    def action_next(self) -> None:
        """Select the message below, or scroll down in one that is longer than the view."""
        index = self._current()
        if index is None:
            return
        end = self._tops[index + 1] - self.size.height
        if end > self.scroll_y:
            self._go_to(min(self.scroll_y + 3, end))
        elif index + 1 < len(self.entries):
            self._select(index + 1)

    def _current(self) -> int | None:
        if not self.entries:
            return None
        return len(self.entries) - 1 if self._selected is None else self._selected

    def action_page(self, pages: int) -> None:
        """Scroll by pages."""
        self._go_to(self.scroll_y + pages * self.size.height)

    def action_to_top(self) -> None:
        """Go to the beginning."""
        self._go_to(0)

    def action_to_end(self) -> None:
        """Go to the end, and follow it."""
        self._selected = None
        self._following = True
        self._laid_out(len(self.entries))

    def action_toggle_thinking(self) -> None:
        """Fold or unfold what the selected message thought."""
        if self.selected:
            self.toggle_thinking(self.selected)

    def toggle_thinking(self, entry: Entry) -> None:
        """Fold or unfold what a message thought."""
        entry.unfolded = not entry.unfolded
        self.changed(entry)

    def action_branch(self, step: int) -> None:
        """Another version of the selected message."""
        if self.selected and self.selected.branch[1] > 1:
            self.post_message(self.BranchAsked(step, self.selected))

    def action_ask(self, what: str) -> None:
        """Have something done with the selected message."""
        if self.selected:
            self.post_message(self.Asked(what, self.selected))

    def action_copy(self) -> None:
        """Copy the selected message."""
        if self.selected:
            self.post_message(self.Copy(self.selected.content, "the message"))

    async def on_key(self, event: events.Key) -> None:
        """Digits copy blocks of code; a binding's action cannot tell which digit it was."""
        if event.key.isdigit() and event.key != "0" and self.selected:
            event.stop()
            event.prevent_default()
            codes, number = self.selected.codes, int(event.key)
            if number <= len(codes):
                self.post_message(self.Copy(codes[number - 1], f"code block {number}"))
            else:
                self.app.bell()

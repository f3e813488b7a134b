"""Every key and every command of the app, searchable."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from rich.cells import cell_len
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from textual import on
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.keys import format_key
from textual.screen import ModalScreen
from textual.widgets import Static

from tui.literal import literal
from tui.widgets.literal_editors import LiteralInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from textual.app import ComposeResult
    from textual.binding import BindingType
    from textual.dom import DOMNode
    from textual.events import Resize
    from textual.widgets import Input

_NAMES = {"escape": "Esc", "pageup": "PgUp", "pagedown": "PgDn", "delete": "Del"}
_TWO_COLUMNS, _KEYS_WIDTH = 120, 26  # in cells


class KeyGroup(NamedTuple):
    """Keys of one part of the app: pairs of keys, as people write them, and what they do."""

    title: str
    entries: Sequence[tuple[str, str]]


def collect_bindings(*classes: type[DOMNode]) -> list[tuple[str, str]]:
    """The keys and descriptions in `BINDINGS` of the classes and of their bases.

    Textual's own bases are left out: their keys (editing, scrolling) count only where such a class
    is given itself, and only those with a description. Keys that do the same share an entry.
    Raises `ValueError` for one of our own bindings without a description.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for owner in _owners(classes):
        for binding in Binding.make_bindings(vars(owner).get("BINDINGS", ())):
            if not binding.description:
                if _is_textuals(owner):
                    continue
                raise ValueError(
                    f"help: {owner.__name__} binds {binding.key!r} without a description; give one"
                )
            keys = found.setdefault((binding.action, binding.description), [])
            name = binding.key_display or key_name(binding.key)
            if name not in keys:
                keys.append(name)
    return [(", ".join(keys), description) for (_, description), keys in found.items()]


def key_name(key: str) -> str:
    """A key of Textual's as people write it: "ctrl+s" is "Ctrl+S", "question_mark" is "?"."""
    *modifiers, last = key.split("+")
    sign = format_key(last)
    is_sign = len(sign) == 1 and sign.isascii()
    name = sign if is_sign else _NAMES.get(last, last.title())
    if modifiers:
        name = name.upper() if len(name) == 1 else name
    return "+".join([*(modifier.title() for modifier in modifiers), name])


def _owners(classes: Sequence[type[DOMNode]]) -> Iterator[type]:
    for cls in classes:
        yield cls
        yield from (base for base in cls.__mro__[1:] if not _is_textuals(base))


def _is_textuals(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "textual"


class HelpScreen(ModalScreen[None]):
    """Lists keys and commands in groups; typing searches, Esc closes."""

    CSS_PATH = "help.tcss"
    AUTO_FOCUS = "LiteralInput"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1", "close", "Close"),
        Binding("up", "scroll(-1)", "Scroll up", show=False),
        Binding("down", "scroll(1)", "Scroll down", show=False),
        Binding("pageup", "scroll_pages(-1)", "Scroll up a page", show=False),
        Binding("pagedown", "scroll_pages(1)", "Scroll down a page", show=False),
    ]

    def __init__(self, groups: Sequence[KeyGroup], commands: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._groups = [*groups, KeyGroup("Commands", commands)]

    def compose(self) -> ComposeResult:
        """The search field above the lists."""
        with Vertical(id="frame"):
            yield Static("Help", id="title", markup=False)
            yield LiteralInput(placeholder="type to search")
            with VerticalScroll(id="lists", can_focus=False), Horizontal():
                yield Static(id="left", classes="column")
                yield Static(id="right", classes="column")
            yield Static("Up Down  scroll    Esc  close", id="keys", markup=False)

    def action_close(self) -> None:
        """Close the help."""
        self.dismiss(None)

    def action_scroll(self, lines: int) -> None:
        """Scroll the lists."""
        self.query_one("#lists").scroll_relative(y=lines, animate=False)

    def action_scroll_pages(self, pages: int) -> None:
        """Scroll the lists by what is in view."""
        lists = self.query_one("#lists")
        lists.scroll_relative(y=pages * lists.size.height, animate=False)

    @on(LiteralInput.Changed)
    def _search_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.query_one("#lists").scroll_home(animate=False)
        self._show()

    def on_resize(self, event: Resize) -> None:
        """Lay the lists out in as many columns as there is room for."""
        self.set_class(event.size.width >= _TWO_COLUMNS, "-wide")
        self._show()
        # The layout that is being made may overlook the new heights.
        for column in self.query(".column"):
            self.call_after_refresh(column.refresh, layout=True)

    def _show(self) -> None:
        search = self.query_one(LiteralInput).value
        groups = list(_matching(self._groups, search))
        left, right = _halves(groups) if self.has_class("-wide") else (groups, [])
        nothing = Text(f"Nothing matches {literal(search)!r}.")
        self.query_one("#left", Static).update(self._table(left) if left else nothing)
        self.query_one("#right", Static).update(self._table(right))

    def _table(self, groups: Sequence[KeyGroup]) -> RenderableType:
        """Titles, and under each its entries: keys of one width, descriptions wrapped."""
        entries = [entry for group in self._groups for entry in group.entries]
        widest = max((cell_len(keys) for keys, _ in entries), default=0)
        parts: list[RenderableType] = []
        for title, rows in groups:
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(width=min(widest, _KEYS_WIDTH))
            table.add_column(ratio=1)
            for keys, description in rows:
                table.add_row(Text(literal(keys)), Text(literal(description)))
            parts += [Text(literal(title), style="bold"), Padding(table, (0, 0, 0, 2)), Text("")]
        return Group(*parts[:-1])


def _matching(groups: Sequence[KeyGroup], search: str) -> Iterator[KeyGroup]:
    """The groups with the entries in which, or in whose title, all words of the search stand."""
    words = search.casefold().split()
    for title, entries in groups:
        found = [
            entry
            for entry in entries
            if all(word in f"{title} {entry[0]} {entry[1]}".casefold() for word in words)
        ]
        if found:
            yield KeyGroup(title, found)


def _halves(groups: Sequence[KeyGroup]) -> tuple[list[KeyGroup], list[KeyGroup]]:
    """Two columns, as equal in height as their order allows; the left one may be taller."""
    heights = [len(group.entries) + 2 for group in groups]
    cuts = range(len(groups), -1, -1)
    cut = min(cuts, key=lambda at: max(sum(heights[:at]), sum(heights[at:])))
    return list(groups[:cut]), list(groups[cut:])

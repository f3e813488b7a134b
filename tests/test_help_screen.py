"""The help screen: every key and command is listed and can be found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from chat_app import in_loop
from textual.app import App
from textual.binding import Binding
from textual.screen import Screen
from textual.widgets import Input

from tui.screens.dialogs import AskText, Confirm, ErrorDialog
from tui.screens.help import HelpScreen, KeyGroup, collect_bindings, key_name
from tui.screens.settings import SettingsScreen

if TYPE_CHECKING:
    from textual.binding import BindingType

GROUPS = [
    KeyGroup("Chat", [("Ctrl+N", "New chat"), ("Esc", "Stop the reply")]),
    KeyGroup("Models", [("Ctrl+O", "Choose a model"), ("Del", "Delete a file")]),
]
COMMANDS = [("/clear", "Begin anew"), ("/system TEXT", "Set the system prompt")]


class Host(App[None]):
    def __init__(self, screen: HelpScreen) -> None:
        super().__init__()
        self.shown = screen
        self.answers: list[Any] = []

    def on_mount(self) -> None:
        self.push_screen(self.shown, self.answers.append)


def drawn(app: App[Any]) -> list[str]:
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


def shows(app: App[Any], *texts: str) -> list[bool]:
    rows = drawn(app)
    return [any(text in row for row in rows) for text in texts]


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
@in_loop
async def test_lists_groups_and_commands(size: tuple[int, int]) -> None:
    app = Host(HelpScreen(GROUPS, COMMANDS))
    async with app.run_test(size=size):
        for group in [*GROUPS, KeyGroup("Commands", COMMANDS)]:
            assert shows(app, group.title) == [True]
            for keys, description in group.entries:
                rows = [row for row in drawn(app) if keys in row]
                assert any(description in row for row in rows)
        assert isinstance(app.focused, Input)


@in_loop
async def test_wide_terminals_get_two_columns() -> None:
    app = Host(HelpScreen(GROUPS, COMMANDS))
    async with app.run_test(size=(200, 60)) as pilot:
        assert any("Chat" in row and "Commands" in row for row in drawn(app))
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        assert all(shows(app, "Chat", "Commands"))
        assert not any("Chat" in row and "Commands" in row for row in drawn(app))


@pytest.mark.parametrize(
    ("search", "found", "gone"),
    [
        ("reply", ["Stop the reply", "Chat"], ["New chat", "Models", "/clear"]),
        ("DEL", ["Delete a file", "Choose a model"], ["Stop", "/clear"]),
        ("ctrl+o", ["Choose a model"], ["New chat", "Delete"]),
        ("models choose", ["Choose a model"], ["Delete", "Chat"]),
        ("/sys", ["/system TEXT"], ["/clear", "Chat"]),
        ("[red]", ["Nothing matches '[red]'."], ["Chat", "Commands"]),
    ],
)
@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
@in_loop
async def test_typing_searches(
    size: tuple[int, int], search: str, found: list[str], gone: list[str]
) -> None:
    app = Host(HelpScreen(GROUPS, COMMANDS))
    async with app.run_test(size=size) as pilot:
        await pilot.press(*search)
        await pilot.pause()
        assert all(shows(app, *found))
        assert not any(shows(app, *gone))
        await pilot.press(*["backspace"] * len(search))
        await pilot.pause()
        assert all(shows(app, "Chat", "Models", "Commands"))


@in_loop
async def test_scrolls_by_keys_and_wheel_while_the_search_has_the_focus() -> None:
    many = [KeyGroup("Many", [(f"Key{i}", f"does {i}.") for i in range(80)])]
    app = Host(HelpScreen(many, []))
    async with app.run_test(size=(80, 24)) as pilot:
        lists = app.screen.query_one("#lists")
        await pilot.press("down")
        assert lists.scroll_y == 1
        await pilot.press("up")
        assert lists.scroll_y == 0
        await pilot.press(*["pagedown"] * 10)
        assert shows(app, "does 79.", "does 0.") == [True, False]
        await pilot.press("7", "9")
        await pilot.pause()
        assert shows(app, "does 79.", "does 0.") == [True, False]
        assert lists.scroll_y == 0


@pytest.mark.parametrize("key", ["escape", "f1"])
@in_loop
async def test_closes(key: str) -> None:
    app = Host(HelpScreen(GROUPS, COMMANDS))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("x", key)
        assert app.answers == [None]


@in_loop
async def test_hostile_text_is_shown_literally_and_long_text_wraps() -> None:
    hostile = "[red]x[/red] \x1b[2J " + "long " * 60 + "END"
    app = Host(HelpScreen([KeyGroup("[b]T\x1b", [("[i]k", hostile)])], [("/[u]", "x")]))
    async with app.run_test(size=(80, 24)):
        assert all(shows(app, r"[b]T\x1b", "[i]k", r"[red]x[/red] \x1b[2J long", "END", "/[u]"))
        assert "\x1b" not in "".join(drawn(app))


# Collecting


class Base(Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [("ctrl+b", "base", "From the base")]


class Page(Base):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s,f2", "save", "Save"),
        Binding("question_mark", "ask", "Ask", show=False),
        Binding("x", "odd", "Odd", key_display="any key"),
        ("ctrl+w", "save", "Save"),
    ]


class Nameless(Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [("ctrl+b", "base")]


def test_collects_own_and_inherited_keys_but_not_textuals() -> None:
    assert collect_bindings(Page) == [
        ("Ctrl+S, F2, Ctrl+W", "Save"),
        ("?", "Ask"),
        ("any key", "Odd"),
        ("Ctrl+B", "From the base"),
    ]
    # A class of Textual's counts where it is asked for.
    keys = {description: keys for keys, description in collect_bindings(Screen)}
    assert keys["Focus Next"] == "Tab"
    assert keys["Focus Previous"] == "Shift+Tab"


def test_refuses_a_key_without_a_description() -> None:
    with pytest.raises(ValueError, match=r"Nameless binds 'ctrl\+b' without a description"):
        collect_bindings(Nameless)


def test_every_key_of_our_screens_is_collected() -> None:
    for screen in (SettingsScreen, HelpScreen, Confirm, AskText, ErrorDialog):
        listed = ", ".join(keys for keys, _ in collect_bindings(screen)).split(", ")
        bound = [key_name(b.key) for b in Binding.make_bindings(screen.BINDINGS)]
        assert sorted(listed) == sorted(bound)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("ctrl+s", "Ctrl+S"),
        ("ctrl+shift+left", "Ctrl+Shift+Left"),
        ("escape", "Esc"),
        ("pagedown", "PgDn"),
        ("ctrl+pageup", "Ctrl+PgUp"),
        ("question_mark", "?"),
        ("slash", "/"),
        ("f5", "F5"),
        ("y", "y"),
        ("space", "Space"),
        ("tab", "Tab"),
        ("backspace", "Backspace"),
        ("enter", "Enter"),
        ("ctrl+comma", "Ctrl+,"),
    ],
)
def test_key_names(key: str, name: str) -> None:
    assert key_name(key) == name

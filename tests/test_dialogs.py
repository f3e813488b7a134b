"""Dialogs, the themes, and how both draw what strangers wrote."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from chat_app import in_loop
from rich.color import Color as RichColor
from rich.color import ColorSystem
from textual.app import App
from textual.color import Color
from textual.theme import BUILTIN_THEMES
from textual.widgets import Button, Static

from tui.literal import literal, one_cell_each
from tui.screens.dialogs import AskText, Confirm, ErrorDialog
from tui.themes import THEMES, theme_names
from tui.widgets.literal_editors import LiteralInput, LiteralTextArea

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.screen import Screen

SIZES = [(80, 24), (200, 60)]
HOSTILE = "[red]x[/red] [@click=app.quit]y[/] \x1b[2J\x1b]0;t\x07 \u202eabc \udcff"
HOSTILE_SHOWN = r"[red]x[/red] [@click=app.quit]y[/] \x1b[2J\x1b]0;t\x07 \u202eabc \udcff"


class Host(App[None]):
    """Shows one screen and keeps its answers."""

    def __init__(self, screen: Screen[Any]) -> None:
        super().__init__()
        self.shown = screen
        self.answers: list[Any] = []

    def on_mount(self) -> None:
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = THEMES[0].name
        self.push_screen(self.shown, self.answers.append)


def drawn(app: App[Any]) -> list[str]:
    """The rows of the screen as text."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


def is_inside(app: App[Any]) -> bool:
    """Whether the frame of the dialog and its buttons lie on the screen."""
    whole = app.screen.region
    buttons = [button.region for button in app.screen.query(Button)]
    frame = app.screen.query_one(".dialog").region
    return frame in whole and all(button in frame and button.area for button in buttons)


# Confirm


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        ("y", True),
        ("n", False),
        ("escape", False),
        ("enter", False),
        ("left enter", True),
        ("tab enter", True),
        ("left right enter", False),
    ],
)
@in_loop
async def test_confirm_by_keys(size: tuple[int, int], keys: str, answer: bool) -> None:
    app = Host(Confirm("Delete the chat?"))
    async with app.run_test(size=size) as pilot:
        assert is_inside(app)
        await pilot.press(*keys.split())
        assert app.answers == [answer]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("button", "answer"), [("#yes", True), ("#no", False)])
@in_loop
async def test_confirm_by_mouse(size: tuple[int, int], button: str, answer: bool) -> None:
    app = Host(Confirm("Delete the chat?", yes="[b]Remove", no="Keep"))
    async with app.run_test(size=size) as pilot:
        row = "\n".join(drawn(app))
        assert "[b]Remove  y" in row
        assert "Keep  n" in row
        await pilot.click(button)
        await pilot.pause(0.3)
        assert app.answers == [answer]


@in_loop
async def test_long_question_scrolls_and_leaves_the_buttons() -> None:
    app = Host(Confirm("\n".join(f"line {i}" for i in range(100)) + "x" * 500))
    async with app.run_test(size=(80, 24)) as pilot:
        assert is_inside(app)
        assert any("line 0 " in row for row in drawn(app))
        await pilot.press(*["pagedown"] * 20)
        assert not any("line 0 " in row for row in drawn(app))
        assert any("xxxx" in row for row in drawn(app))
        await pilot.press("up", "y")
        assert app.answers == [True]


# AskText


def no_slash(text: str) -> str | None:
    return f"'{text}' has a / in it [b]" if "/" in text else None


@pytest.mark.parametrize("size", SIZES)
@in_loop
async def test_ask_text_takes_what_was_typed(size: tuple[int, int]) -> None:
    app = Host(AskText("A name", "old"))
    async with app.run_test(size=size) as pilot:
        assert is_inside(app)
        await pilot.press("end", "e", "r", "enter")
        assert app.answers == ["older"]


@in_loop
async def test_ask_text_objects_as_it_is_typed_and_stays_open() -> None:
    app = Host(AskText("A name", "a", no_slash))
    async with app.run_test(size=(80, 24)) as pilot:
        objection = app.screen.query_one("#objection", Static)
        assert not objection.display
        await pilot.press("end", "/")
        assert any("! 'a/' has a / in it [b]" in row for row in drawn(app))
        assert is_inside(app)
        await pilot.press("enter")
        assert app.answers == []
        await pilot.click("#ok")
        await pilot.pause(0.3)
        assert app.answers == []
        assert isinstance(app.focused, LiteralInput)
        await pilot.press("end", "backspace")
        assert not objection.display
        await pilot.click("#ok")
        await pilot.pause(0.3)
        assert app.answers == ["a"]


@in_loop
async def test_ask_text_checks_the_text_it_began_with_on_enter() -> None:
    app = Host(AskText("A name", "a/b", no_slash))
    async with app.run_test(size=(80, 24)) as pilot:
        assert not app.screen.query_one("#objection").display
        await pilot.press("enter")
        assert app.answers == []
        assert app.screen.query_one("#objection").display


@pytest.mark.parametrize("how", ["escape", "#cancel"])
@in_loop
async def test_ask_text_is_cancelled(how: str) -> None:
    app = Host(AskText("A name", "old", lambda _: "never"))
    async with app.run_test(size=(80, 24)) as pilot:
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        await pilot.pause(0.3)
        assert app.answers == [None]


# ErrorDialog


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["escape", "enter", "#close"])
@in_loop
async def test_error_closes(size: tuple[int, int], how: str) -> None:
    app = Host(ErrorDialog("Not loaded", "no such file"))
    async with app.run_test(size=size) as pilot:
        assert is_inside(app)
        assert any("! Not loaded" in row for row in drawn(app))
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        await pilot.pause(0.3)
        assert app.answers == [None]


@pytest.mark.parametrize("how", ["c", "#copy"])
@in_loop
async def test_error_is_copied_as_it_is(how: str) -> None:
    message = f"{HOSTILE[:-1]}\n" * 50
    app = Host(ErrorDialog("Not loaded", message))
    async with app.run_test(size=(80, 24)) as pilot:
        assert is_inside(app)
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        assert app.clipboard == message
        assert any("Copied" in row for row in drawn(app))
        assert app.answers == []


@in_loop
async def test_long_error_wraps_and_scrolls() -> None:
    app = Host(ErrorDialog("Not loaded", "x" * 3000 + "END"))
    async with app.run_test(size=(80, 24)) as pilot:
        assert not any("END" in row for row in drawn(app))
        await pilot.press("end")
        await pilot.pause(0.2)
        assert any("END" in row for row in drawn(app))
        assert is_inside(app)


# What strangers wrote


@pytest.mark.parametrize(
    "make",
    [
        lambda: Confirm(HOSTILE),
        lambda: AskText(HOSTILE),
        lambda: ErrorDialog(HOSTILE, "x"),
        lambda: ErrorDialog("x", HOSTILE),
    ],
)
@in_loop
async def test_hostile_text_is_shown_literally(make: Callable[[], Screen[Any]]) -> None:
    app = Host(make())
    async with app.run_test(size=(200, 60)):
        rows = drawn(app)
        # A dialog may be too narrow for one line.
        text = "".join("".join(rows).replace("│", "").split())
        assert HOSTILE_SHOWN.replace(" ", "") in text
        assert "\x1b" not in text


@pytest.mark.parametrize("kind", [LiteralInput, LiteralTextArea])
@in_loop
async def test_editors_keep_what_they_do_not_draw(
    kind: type[LiteralInput] | type[LiteralTextArea],
) -> None:
    text = "a\x1b[2J[red]\x9b\u202ez"

    class Page(App[None]):
        def compose(self) -> Any:
            yield kind(text)

    app = Page()
    async with app.run_test(size=(80, 24)):
        rows = drawn(app)
        assert any("a░[2J[red]░░z" in row for row in rows)
        assert not {"\x1b", "\x9b", "\u202e"} & set("".join(rows))
        editor = app.query_one(kind)
        assert (editor.value if isinstance(editor, LiteralInput) else editor.text) == text


def test_literal() -> None:
    assert literal("plain [b] é 漢 😀") == "plain [b] é 漢 😀"
    assert literal("a\r\nb\tc\rd\x00\x7f\x85") == r"a" + "\n" + r"b    c\rd\x00\x7f\x85"
    assert one_cell_each("a\x1b\ud800\nb") == "a░░░b"


# Themes


def luminance(color: Color) -> float:
    """Relative luminance by WCAG 2.1."""
    parts = [value / 255 for value in color.rgb]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: Color, other: Color) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_formula() -> None:
    # Pairs with known ratios, from WCAG's own examples.
    assert contrast(Color.parse("#ffffff"), Color.parse("#000000")) == pytest.approx(21)
    assert contrast(Color.parse("#777777"), Color.parse("#ffffff")) == pytest.approx(4.48, abs=0.01)


async def contrasts(theme: str, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Contrast of text on background, each a variable, as Textual draws them."""

    class Page(App[None]):
        CSS = "".join(
            f"#pair{i} {{ color: {text}; background: {background}; }}"
            for i, (text, background) in enumerate(pairs)
        )

        def on_mount(self) -> None:
            for ours in THEMES:
                self.register_theme(ours)
            self.theme = theme

        def compose(self) -> Any:
            for i in range(len(pairs)):
                yield Static(f"<{i}>", id=f"pair{i}")

    app = Page()
    found = {}
    async with app.run_test(size=(20, 60)) as pilot:
        await pilot.pause()
        for strip in app.screen._compositor.render_strips():
            for text, style, _ in strip:
                if text.startswith("<"):
                    assert style is not None
                    assert style.color is not None
                    assert style.bgcolor is not None
                    drawn_colors = map(Color.from_rich_color, (style.color, style.bgcolor))
                    found[pairs[int(text.strip("<> "))]] = contrast(*drawn_colors)
    assert len(found) == len(pairs)
    return found


TEXTS = {
    **dict.fromkeys(["$foreground", "$text"], 7.0),
    **dict.fromkeys(["$text-muted", "$foreground-muted", "$text-disabled"], 4.5),
    **dict.fromkeys(["$primary", "$error", "$warning", "$success"], 4.5),
    **dict.fromkeys(["$text-primary", "$text-error", "$text-warning", "$text-success"], 4.5),
}


BACKGROUNDS = ["$background", "$surface", "$panel", "$boost"]
SELECTIONS = [
    ("$block-cursor-foreground", "$block-cursor-background"),
    ("$block-cursor-blurred-foreground", "$block-cursor-blurred-background"),
    ("$input-selection-foreground", "$input-selection-background"),
    ("$input-cursor-foreground", "$input-cursor-background"),
    ("$footer-foreground", "$footer-background"),
    ("$text", "$primary"),
    ("$text", "$error"),
]


@pytest.mark.parametrize("theme", [theme.name for theme in THEMES])
@in_loop
async def test_contrast_of_text(theme: str) -> None:
    pairs = [(text, background) for text in TEXTS for background in BACKGROUNDS]
    ratios = await contrasts(theme, pairs)
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < TEXTS[pair[0]]} == {}


@pytest.mark.parametrize("theme", [theme.name for theme in THEMES])
@in_loop
async def test_contrast_of_selections(theme: str) -> None:
    ratios = await contrasts(theme, SELECTIONS)
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_sixteen_colours_stay_apart(theme: Any) -> None:
    colors = theme.to_color_system().generate()

    def number(name: str) -> int | None:
        rich = RichColor.parse(Color.parse(colors[name]).hex6)
        return rich.downgrade(ColorSystem.STANDARD).number

    page = {number(name) for name in ("background", "surface", "panel")}
    assert len(page) == 1
    signals = ["foreground", "foreground-muted", "primary", "error", "warning", "success"]
    assert len({number(name) for name in signals} - page) == len(signals)
    assert number("text-error") == number("error")
    assert number("block-cursor-background") not in page
    assert number("input-selection-background") not in page
    assert len({number("border"), number("border-blurred"), *page}) == 3


def test_theme_names_begin_with_ours() -> None:
    names = theme_names()
    assert names[:2] == ("localds-dark", "localds-light")
    assert set(names[2:]) == set(BUILTIN_THEMES)
    assert len(set(names)) == len(names)


def test_one_accent() -> None:
    for theme in THEMES:
        assert theme.primary == theme.secondary == theme.accent


def test_dialogs_load_without_the_runtime() -> None:
    code = "import sys, tui.screens.dialogs, tui.themes; sys.exit('localds.model' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)

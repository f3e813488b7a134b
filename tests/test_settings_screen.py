"""The settings screen: what it shows, what it refuses, and what it gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from chat_app import in_loop
from textual.app import App
from textual.widgets import Button, Input, Select, Static, TextArea

from tui.screens.dialogs import Confirm
from tui.screens.settings import SettingsResult, SettingsScreen
from tui.screens.settings_draft import Draft
from tui.settings import BY_KEY, SETTINGS
from tui.themes import theme_names
from tui.widgets.setting_field import SettingField, Unset

if TYPE_CHECKING:
    from collections.abc import Mapping

    from textual.pilot import Pilot

SIZES = [(80, 24), (200, 60)]
FILE = ("the model's file", {"temperature": 0.6, "top_p": 0.9})


class Host(App[None]):
    """Shows the screen and keeps what it gives back."""

    def __init__(
        self,
        chat: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        everything: Mapping[str, Any] | None = None,
        below: list[tuple[str, Mapping[str, Any]]] | None = None,
        title: str = "Tiny",
    ) -> None:
        super().__init__()
        self.page = SettingsScreen(
            chat or {}, model or {}, everything or {}, below or [FILE], title, 4096
        )
        self.answers: list[SettingsResult | None] = []

    def on_mount(self) -> None:
        self.push_screen(self.page, self.answers.append)

    def field(self, key: str) -> SettingField:
        return self.page.query_one(f"#setting-{key}", SettingField)

    def editor(self, key: str) -> Any:
        return self.field(key).query_one("Input, TextArea, Select")

    def told(self, key: str) -> str:
        """What stands in the empty field."""
        editor = self.editor(key)
        if isinstance(editor, Select):
            assert isinstance(editor.value, Unset)
            return str(editor.query_one("#label", Static).visual)
        assert editor.value == "" if isinstance(editor, Input) else editor.text == ""
        return str(editor.placeholder)

    def problem(self, key: str) -> str:
        line = self.field(key).query_one(".problem", Static)
        assert line.display == self.field(key).has_class("-wrong")
        return str(line.visual) if line.display else ""

    async def write(self, pilot: Pilot[None], key: str, text: str) -> None:
        """Type into the field of a key, in place of what is there."""
        self.field(key).focus_editor()
        await pilot.pause()
        editor = self.editor(key)
        if isinstance(editor, TextArea):
            editor.select_all()
        else:
            editor.action_select_all()
        await pilot.press("backspace")
        for character in text:
            await pilot.press("enter" if character == "\n" else character)
        await pilot.pause()

    async def choose(self, pilot: Pilot[None], key: str, *keys: str) -> None:
        self.field(key).focus_editor()
        await pilot.press("enter", *keys, "enter")
        await pilot.pause()


def drawn(app: App[Any]) -> list[str]:
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


# What is shown


@pytest.mark.parametrize("size", SIZES)
@in_loop
async def test_every_field_can_be_reached_by_tab_and_is_in_view(size: tuple[int, int]) -> None:
    app = Host()
    async with app.run_test(size=size) as pilot:
        form = app.page.query_one("#form")
        for setting in SETTINGS:
            focused = app.focused
            assert focused is app.editor(setting.key)
            assert focused is not None
            assert focused.region in form.region
            assert focused.region.area
            rows = "".join(drawn(app))
            assert f"▸ {setting.label}" in rows
            shown_help = str(app.page.query_one("#help", Static).visual)
            assert shown_help.startswith(setting.help)
            assert ("loaded again" in shown_help) == setting.needs_reload
            await pilot.press("tab")
        assert isinstance(app.focused, Button)


@in_loop
async def test_help_is_wholly_in_view_at_80_columns() -> None:
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        for setting in SETTINGS:
            rows = " ".join(" ".join(row.split()) for row in drawn(app)[-4:])
            assert setting.help in rows
            assert ("loaded again" in rows) == setting.needs_reload
            await pilot.press("tab")


@in_loop
async def test_wide_terminals_get_two_columns() -> None:
    app = Host()
    async with app.run_test(size=(200, 60)) as pilot:
        assert any("Sampling" in row and "Reply" in row for row in drawn(app))
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        assert not any("Sampling" in row and "Reply" in row for row in drawn(app))


@in_loop
async def test_shows_values_and_what_counts_where_there_are_none() -> None:
    app = Host(
        {"top_k": 7, "show_panel": False, "stop": ("\n\n", " a")},
        {"min_p": 0.25, "temperature": 0.5},
        {"system": "be\nkind", "min_p": 0.75, "cache_type": "q8_0"},
        [("command line", {"threads": 3}), FILE],
    )
    async with app.run_test(size=(200, 60)) as pilot:
        assert app.editor("top_k").value == "7"
        assert app.editor("stop").text == "\\n\\n\n\\sa"
        assert app.editor("show_panel").value == "no"
        assert app.told("min_p") == "0.25 · this model"
        assert app.told("temperature") == "0.5 · this model"
        assert app.told("top_p") == "0.9 · the model's file"
        assert app.told("threads") == "3 · command line"
        assert app.told("system") == "be kind · all models"
        assert app.told("cache_type") == "not set: q8_0 · all models"
        assert app.told("show_thinking") == "not set: no · default"
        assert app.told("seed") == "not set"
        assert app.told("max_tokens") == "not set"
        await pilot.press("f6")
        assert app.editor("min_p").value == "0.25"
        assert app.told("top_k") == "40 · default"
        assert app.told("show_panel") == "not set: yes · default"
        await pilot.press("f6")
        assert app.editor("min_p").value == "0.75"
        assert app.editor("system").text == "be\nkind"
        assert app.editor("cache_type").value == "q8_0"
        assert app.told("temperature") == "0.6 · the model's file"


@in_loop
async def test_reload_is_told_beside_the_fields_that_need_it() -> None:
    app = Host()
    async with app.run_test(size=(200, 60)):
        rows = [row for row in drawn(app) if "loaded again" in row]
        assert len(rows) == 1
        assert "Memory · applies when the model is loaded again" in rows[0]
        # The heading speaks for its whole section.
        assert all(s.needs_reload == (s.section == "Memory") for s in SETTINGS)


@pytest.mark.parametrize("size", SIZES)
@in_loop
async def test_hostile_text_is_shown_literally(size: tuple[int, int]) -> None:
    hostile = "[red]x[/red] \x1b[2Jy"
    app = Host(
        {"stop": (hostile,), "theme": hostile},
        everything={"system": hostile},
        below=[("[b]file\x1b", {"threads": 3, "cache_type": "f32"})],
        title=hostile + "long " * 100,
    )
    async with app.run_test(size=size) as pilot:
        seen = ""
        for _ in SETTINGS:
            seen += "".join(drawn(app))
            await pilot.press("tab")
        await pilot.press("f6", "f6")
        seen += "".join(drawn(app))
        assert r"Settings · [red]x[/red] \x1b[2Jy" in seen  # the title
        assert "[red]x[/red] ░[2Jy" in seen  # the editor of several lines
        assert r"[red]x[/red] \x1b[2Jy · all models" in seen  # what counts
        assert r"3 · [b]file\x1b" in seen
        assert r"not set: f32 · [b]file\x1b" in seen
        assert r"[red]x[/red] \x1b[2Jy" in seen
        assert "\x1b" not in seen


# What is given back

STRANGE: dict[str, Any] = {
    "temperature": 0.1 + 0.2,
    "top_k": 3,
    "repetition_penalty": 1.0,
    "presence_penalty": 1e-300,
    "seed": 10**30,
    "system": "a\r\nb\x0bc\u2028d\n\n",
    "stop": ["", " x ", "\\n", "\t"][1:],
    "ram": " 12 GiB",
    "theme": "nord",
    "show_thinking": False,
    "context": None,
    "unknown": {"kept": [1]},
}


@in_loop
async def test_what_is_not_edited_comes_back_exactly() -> None:
    blank = {"system": "", "stop": (), "max_tokens": None}
    app = Host(STRANGE, blank, dict(STRANGE))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f6", "f6", "f6", "f5", "ctrl+pageup", "ctrl+pageup", "ctrl+pageup")
        # Everything was looked at; the chat was reset, so put one edit in and take it back.
        await pilot.press("escape", "n")
        await pilot.press("escape", "y")
        assert app.answers == [None]

    app = Host(STRANGE, blank, dict(STRANGE))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f6", "f6", "f6")
        await app.write(pilot, "top_k", "4")
        await app.write(pilot, "top_k", "3")
        await app.write(pilot, "min_p", "1")
        await app.write(pilot, "min_p", "")
        await pilot.press("ctrl+s")
        assert app.answers == [SettingsResult(STRANGE, blank, STRANGE, reload=False)]
        assert repr(app.answers[0].chat) == repr(STRANGE)  # type: ignore[union-attr]


@pytest.mark.parametrize(("size", "how"), [(SIZES[0], "ctrl+s"), (SIZES[1], "#save")])
@in_loop
async def test_every_kind_of_value_is_edited(size: tuple[int, int], how: str) -> None:
    app = Host({"top_k": 7, "show_panel": False})
    async with app.run_test(size=size) as pilot:
        await app.write(pilot, "temperature", "1.25")
        await app.write(pilot, "top_k", "")
        await app.write(pilot, "seed", "42")
        await app.write(pilot, "system", "one\ntwo")
        await app.write(pilot, "stop", "a\n\\n")
        await app.write(pilot, "ram", "12GiB")
        await app.choose(pilot, "cache_type", "down", "down")
        await app.choose(pilot, "theme", *"nord")
        await app.choose(pilot, "show_thinking", "down", "down")
        await app.choose(pilot, "show_panel", "home")
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        await pilot.pause(0.3)
        (result,) = app.answers
        assert result is not None
        assert result.chat == {
            "temperature": 1.25,
            "seed": 42,
            "system": "one\ntwo",
            "stop": ("a", "\n"),
            "ram": "12GiB",
            "cache_type": "q8_0",
            "theme": "nord",
            "show_thinking": False,
        }
        assert (result.model, result.everything, result.reload) == ({}, {}, True)
        for key, value in result.chat.items():
            assert BY_KEY[key].check(value) == value


@in_loop
async def test_scopes_keep_their_own_edits() -> None:
    app = Host({"top_k": 1}, {"top_k": 2}, {"top_k": 3})
    async with app.run_test(size=(80, 24)) as pilot:
        await app.write(pilot, "top_k", "10")
        await pilot.press("f6")
        await app.write(pilot, "top_k", "20")
        await pilot.press("ctrl+pagedown")
        await app.write(pilot, "top_k", "30")
        await app.write(pilot, "min_p", "0.5")
        await pilot.press("ctrl+pageup", "ctrl+pageup")
        assert app.editor("top_k").value == "10"
        # What counts follows the edits below.
        assert app.told("min_p") == "0.5 · all models"
        await pilot.press("ctrl+s")
        expected = SettingsResult({"top_k": 10}, {"top_k": 20}, {"top_k": 30, "min_p": 0.5}, False)
        assert app.answers == [expected]


@in_loop
async def test_scopes_are_chosen_by_mouse_and_arrow_keys() -> None:
    app = Host({"top_k": 1}, {"top_k": 2}, {"top_k": 3})
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.click("#everything")
        await pilot.pause()
        assert app.editor("top_k").value == "3"
        await pilot.click("#model")
        await pilot.pause()
        assert app.editor("top_k").value == "2"
        app.page.query_one("Tabs").focus()
        await pilot.press("left")
        await pilot.pause()
        assert app.editor("top_k").value == "1"


@pytest.mark.parametrize("how", ["f5", "#reset"])
@in_loop
async def test_reset_empties_one_scope(how: str) -> None:
    app = Host({"top_k": 1}, {"top_k": 2, "theme": "nord", "stop": (), "other": 5}, {"top_k": 3})
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f6")
        await app.write(pilot, "min_p", "0.5")
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        await pilot.pause(0.3)
        assert app.told("top_k") == "3 · all models"
        assert app.told("min_p") == "0.05 · default"
        assert isinstance(app.editor("theme").value, Unset)
        await pilot.press("ctrl+s")
        # A key that is no setting is not the screen's to delete.
        assert app.answers == [SettingsResult({"top_k": 1}, {"other": 5}, {"top_k": 3}, False)]


@pytest.mark.parametrize(
    ("chat", "everything", "edits", "reload"),
    [
        ({}, {}, {"temperature": "1"}, False),
        ({}, {}, {"context": "100"}, True),
        ({}, {}, {"threads": "3"}, False),  # the command line says so already
        ({}, {"context": 100}, {"context": "100"}, False),
        ({"context": 100}, {}, {"context": ""}, True),
        ({"ram": "1GiB"}, {"ram": "1GiB"}, {"ram": ""}, False),
        ({}, {}, {"cache_type": "f32"}, True),
        ({}, {}, {"cache_type": "f16"}, False),  # the default
    ],
)
@in_loop
async def test_reload_where_what_counts_changes(
    chat: dict[str, Any], everything: dict[str, Any], edits: dict[str, str], reload: bool
) -> None:
    app = Host(chat, None, everything, [("command line", {"threads": 3})])
    async with app.run_test(size=(80, 24)) as pilot:
        for key, text in edits.items():
            if key == "cache_type":
                await app.choose(pilot, key, *text)
            else:
                await app.write(pilot, key, text)
        await pilot.press("ctrl+s")
        assert app.answers[0] is not None
        assert app.answers[0].reload == reload


@in_loop
async def test_reload_not_for_a_layer_that_is_covered() -> None:
    app = Host({"context": 100})
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f6", "f6")
        await app.write(pilot, "context", "200")
        await pilot.press("ctrl+s")
        assert app.answers == [SettingsResult({"context": 100}, {}, {"context": 200}, False)]


# What is refused


@pytest.mark.parametrize(
    ("size", "key", "text", "message", "mended"),
    [
        (SIZES[0], "temperature", "hot", "'hot' is no number", "1"),
        (SIZES[1], "temperature", "-1", "too small", "0"),
        (SIZES[0], "top_p", "2", "too large", "1"),
        (SIZES[1], "seed", "1.5", "no whole number", "1"),
        (SIZES[0], "context", "4097", "at most 4096 tokens", "4096"),
        (SIZES[0], "ram", "12 [b]", "size '12 [b]' is not understood", "12"),
        (SIZES[1], "ram", "12 [b]", "size '12 [b]' is not understood", "12"),
        (SIZES[0], "stop", "\\q", r"\q means nothing", "q"),
    ],
)
@in_loop
async def test_wrong_text_is_told_as_it_is_typed_and_not_saved(
    size: tuple[int, int], key: str, text: str, message: str, mended: str
) -> None:
    app = Host()
    async with app.run_test(size=size) as pilot:
        await app.write(pilot, key, text)
        assert message in app.problem(key)
        assert not app.problem(key).startswith(key)
        app.field("min_p").focus_editor()
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert app.answers == []
        assert app.focused is app.editor(key)
        assert app.focused.region in app.page.query_one("#form").region
        assert any("! Not saved: a field is wrong" in row for row in drawn(app))
        assert any(f"! {BY_KEY[key].label}" in row for row in drawn(app))
        await app.write(pilot, key, mended)
        assert app.problem(key) == ""
        assert not any("Not saved" in row for row in drawn(app))
        await pilot.press("ctrl+s")
        assert app.answers[0] is not None
        assert app.answers[0].chat == {key: BY_KEY[key].parse(mended)}


@in_loop
async def test_the_first_wrong_field_gets_the_focus_whatever_its_scope() -> None:
    app = Host(model={"top_k": -5, "seed": "x"})
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert app.focused is app.editor("top_k")
        assert app.page.query_one("Tabs").active == "model"  # type: ignore[attr-defined]
        assert app.editor("top_k").value == "-5"
        assert any("! Not saved: 2 fields are wrong" in row for row in drawn(app))
        await pilot.press("ctrl+pageup")
        await app.write(pilot, "max_tokens", "0")
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert app.focused is app.editor("max_tokens")


@in_loop
async def test_longest_context_binds_the_chat_and_the_model_but_not_all_models() -> None:
    app = Host(model={"context": 9000})
    async with app.run_test(size=(80, 24)) as pilot:
        await app.write(pilot, "context", "5000")
        assert "at most 4096" in app.problem("context")
        await app.write(pilot, "context", "")
        await pilot.press("f6")
        assert "9000 is too large" in app.problem("context")
        await app.write(pilot, "context", "")
        await pilot.press("f6")
        await app.write(pilot, "context", "9000")
        assert app.problem("context") == ""
        await pilot.press("ctrl+s")
        # 9000 counted before as well.
        assert app.answers == [SettingsResult({}, {}, {"context": 9000}, reload=False)]


@in_loop
async def test_values_of_a_wrong_kind_are_shown_and_refused() -> None:
    wrong = {"stop": [1, 2], "show_panel": "perhaps", "theme": "none such", "system": 5}
    app = Host(wrong)
    async with app.run_test(size=(200, 60)) as pilot:
        for key in wrong:
            assert app.problem(key)
        assert app.editor("show_panel").value == "perhaps"
        await pilot.press("ctrl+s")
        assert app.answers == []
        await pilot.press("f5", "ctrl+s")
        assert app.answers == [SettingsResult({}, {}, {}, False)]


# Leaving


@pytest.mark.parametrize("how", ["escape", "#close"])
@in_loop
async def test_closes_at_once_where_nothing_changed(how: str) -> None:
    app = Host({"top_k": 1})
    async with app.run_test(size=(80, 24)) as pilot:
        await app.write(pilot, "top_k", "2")
        await app.write(pilot, "top_k", "1")
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        await pilot.pause(0.3)
        assert app.answers == [None]


@pytest.mark.parametrize("how", ["escape", "#close"])
@in_loop
async def test_asks_before_changes_are_lost(how: str) -> None:
    app = Host({"top_k": 1})
    async with app.run_test(size=(80, 24)) as pilot:
        await app.write(pilot, "top_k", "2")
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        await pilot.pause(0.3)
        assert isinstance(app.screen, Confirm)
        await pilot.press("n")
        assert app.answers == []
        assert app.editor("top_k").value == "2"
        await (pilot.click(how) if how.startswith("#") else pilot.press(how))
        await pilot.pause(0.3)
        await pilot.press("y")
        await pilot.pause()
        assert app.answers == [None]


@in_loop
async def test_escape_closes_an_open_list_first() -> None:
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        app.field("theme").focus_editor()
        await pilot.press("enter")
        assert app.editor("theme").expanded
        await pilot.press("escape")
        assert not app.editor("theme").expanded
        assert app.answers == []
        await pilot.press("escape")
        assert app.answers == [None]


# Moving about


@in_loop
async def test_enter_and_arrows_move_between_fields() -> None:
    app = Host()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("enter")
        assert app.focused is app.editor("top_k")
        await pilot.press("down", "down", "up")
        assert app.focused is app.editor("top_p")
        app.field("theme").focus_editor()
        await pilot.press("down")
        assert app.focused is app.editor("show_thinking")
        assert not app.editor("theme").expanded


@in_loop
async def test_lists_are_chosen_from_by_mouse() -> None:
    app = Host()
    async with app.run_test(size=(200, 60)) as pilot:
        await pilot.click(app.editor("show_panel").query_one("#label"))
        await pilot.pause()
        assert app.editor("show_panel").expanded
        # Not set, yes, no: below the frame of the list.
        await pilot.click(app.editor("show_panel").query_one("SelectOverlay"), offset=(4, 3))
        await pilot.pause()
        assert app.editor("show_panel").value == "no"


@in_loop
async def test_themes_on_offer() -> None:
    app = Host()
    async with app.run_test(size=(80, 24)):
        options = [value for _, value in app.editor("theme")._options]
        assert tuple(options[1:]) == theme_names()


def test_the_command_line_stands_between_this_chat_and_this_model() -> None:
    given = {"chat": {}, "model": {"top_k": 3}, "everything": {"top_k": 4, "min_p": 0.5}}
    line = [("the command line", {"top_k": 2, "ram": "1GiB"})]
    draft = Draft(SETTINGS, given, [], None, line)  # type: ignore[arg-type]
    assert draft.without("chat")["top_k"] == "2 · the command line"
    assert draft.without("chat")["min_p"] == "0.5 · all models"
    assert draft.without("model")["top_k"] == "4 · all models"
    draft.edit("model", "ram", "2GiB")
    assert not draft.result().reload
    draft.edit("chat", "ram", "3GiB")
    assert draft.result().reload

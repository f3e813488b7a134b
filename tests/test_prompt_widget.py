"""The prompt: keys, attachments, completions and earlier inputs, driven in a running app."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from textual import events
from textual.app import App
from textual.widgets import Button, Static, TextArea

from tui.store.records import Attachment
from tui.widgets.chips import Chips
from tui.widgets.completion_list import CompletionList
from tui.widgets.prompt import PLACEHOLDER, Prompt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from textual.app import ComposeResult
    from textual.binding import BindingType
    from textual.pilot import Pilot

pytestmark = pytest.mark.timeout(60)


@dataclass
class Command:
    name: str
    summary: str = ""
    arguments: list[str] = field(default_factory=list)

    def complete(self, prefix: str) -> list[str]:
        return [text for text in self.arguments if text.startswith(prefix)]


COMMANDS = [
    Command("model", "choose another model", ["lite", "large"]),
    Command("mode"),
    Command("help", "keys and commands"),
]


class Chat(App[None]):
    CSS = "#log { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "note('escape')", ""),
        ("pageup", "note('pageup')", ""),
    ]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.prompt = Prompt()
        self.prompt.folder = folder
        self.prompt.commands = COMMANDS

    def compose(self) -> ComposeResult:
        yield Static(id="log")
        yield Button("other")
        yield self.prompt

    def on_mount(self) -> None:
        self.prompt.focus()

    def action_note(self, what: str) -> None:
        self.seen.append(what)

    def on_prompt_submitted(self, message: Prompt.Submitted) -> None:
        self.seen.append((message.text, message.attachments))

    def on_prompt_failed(self, message: Prompt.Failed) -> None:
        self.seen.append(message.message)

    @property
    def editor(self) -> TextArea:
        return self.query_one(TextArea)

    @property
    def list(self) -> CompletionList:
        return self.query_one(CompletionList)

    @property
    def shown(self) -> list[str]:
        return [candidate.shown for candidate in self.list.candidates] if self.list.display else []

    @property
    def chosen(self) -> str | None:
        return self.list.chosen.shown if self.list.chosen else None

    @property
    def chips(self) -> str:
        widget = self.query_one(Chips)
        return str(widget.render()) if widget.display else ""

    def screen_rows(self) -> list[str]:
        return [strip.text for strip in self.screen._compositor.render_strips()]


def driven(
    body: Callable[[Chat, Pilot[None], Path], Awaitable[None]], size: tuple[int, int] = (80, 24)
) -> Callable[[Path], None]:
    """Make a test of a coroutine that gets a running app, its pilot and an empty folder."""

    @wraps(body)
    def test(tmp_path: Path) -> None:
        async def run() -> None:
            app = Chat(tmp_path)
            async with app.run_test(size=size) as pilot:
                await body(app, pilot, tmp_path)

        asyncio.run(run())

    del test.__wrapped__  # type: ignore[attr-defined]  # pytest would read its arguments.
    return test


async def write(pilot: Pilot[None], text: str) -> None:
    await pilot.press(*("space" if c == " " else c for c in text))
    await settle(pilot)


async def settle(pilot: Pilot[None]) -> None:
    for _ in range(3):
        await pilot.app.workers.wait_for_complete()
        await pilot.pause()


async def paste(app: Chat, pilot: Pilot[None], text: str) -> None:
    app.post_message(events.Paste(text))
    await settle(pilot)


# --- sending and new lines


@driven
async def test_enter_sends_and_empties_the_prompt(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await write(pilot, "hello you")
    await pilot.press("enter")
    assert app.seen == [("hello you", ())]
    assert app.prompt.text == ""


@driven
async def test_nothing_is_sent_without_text(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await pilot.press("enter", "space", "ctrl+j", "enter")
    assert app.seen == []
    assert app.prompt.text == " \n"


@driven
async def test_every_key_for_a_new_line(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await pilot.press("a", "ctrl+j", "b", "shift+enter", "c", "ctrl+j", "d", "\\", "enter", "e")
    assert app.prompt.text == "a\nb\nc\nd\ne"
    await pilot.press("enter")
    assert app.seen == [("a\nb\nc\nd\ne", ())]


@driven
async def test_a_backslash_inside_a_line_is_text(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await pilot.press("\\", "a", "enter")
    assert app.seen == [("\\a", ())]


@driven
async def test_blank_ends_go_and_indents_stay(app: Chat, pilot: Pilot[None], _: Path) -> None:
    app.prompt.set_text("\n  \n    indented\n\n")
    await pilot.press("enter")
    assert app.seen == [("    indented", ())]


@driven
async def test_keys_typed_ahead_keep_their_order(app: Chat, pilot: Pilot[None], _: Path) -> None:
    for key in ["a", "b", "backspace", "c", "left", "d", "enter", "e"]:
        app.post_message(events.Key(key, key if len(key) == 1 else None))
    await settle(pilot)
    assert app.seen == [("adc", ())]
    assert app.prompt.text == "e"


@driven
async def test_editing_keys_of_a_shell(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await write(pilot, "one two three")
    await pilot.press("ctrl+w")
    assert app.prompt.text == "one two "
    await pilot.press("ctrl+a", "x", "ctrl+e", "y")
    assert app.prompt.text == "xone two y"
    await pilot.press("ctrl+a", *["right"] * 4, "ctrl+k")
    assert app.prompt.text == "xone"
    await pilot.press("ctrl+u")
    assert app.prompt.text == ""
    await pilot.press("ctrl+z")
    assert app.prompt.text == "xone two y"


@driven
async def test_other_keys_go_on_to_the_app(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await pilot.press("escape", "pageup")
    assert app.seen == ["escape", "pageup"]
    await pilot.press("tab")
    assert app.focused is not app.editor


# --- looks


@pytest.mark.parametrize(("rows", "most"), [(24, 8), (60, 10), (12, 4)])
def test_grows_up_to_a_third_of_the_screen_then_scrolls(
    tmp_path: Path, rows: int, most: int
) -> None:
    async def body(app: Chat, pilot: Pilot[None], _: Path) -> None:
        assert app.editor.size.height == 1
        for lines in range(2, 13):
            await pilot.press("ctrl+j")
            await pilot.pause()
            assert app.editor.size.height == min(lines, most)
            assert app.prompt.region.bottom == rows
        assert app.editor.scroll_offset.y == 12 - most
        await pilot.press("enter", "x")
        app.prompt.clear()
        await pilot.pause()
        assert app.editor.size.height == 1

    driven(body, (80, rows))(tmp_path)


@driven
async def test_long_lines_grow_by_wrapping(app: Chat, pilot: Pilot[None], _: Path) -> None:
    app.prompt.set_text("word " * 40)
    await pilot.pause()
    assert app.editor.size.height == 3


@driven
async def test_placeholder_is_literal_and_fits(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await pilot.pause()
    assert any(PLACEHOLDER in row for row in app.screen_rows())
    await pilot.press("a")
    assert not any(PLACEHOLDER in row for row in app.screen_rows())


@driven
async def test_control_characters_are_not_drawn(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await paste(app, pilot, "a\x1b[31mb")
    assert app.prompt.text == "a\x1b[31mb"
    assert not any("\x1b" in row for row in app.screen_rows())


@driven
async def test_a_megabyte_can_be_edited(app: Chat, pilot: Pilot[None], _: Path) -> None:
    for text in ("word " * 200_000, ("@word (" * 10 + "\n") * 15_000):
        app.prompt.set_text(text)
        await pilot.pause()
        await pilot.press("a", "left", "backspace")
        assert len(app.prompt.text) == len(text.rstrip("\n")) + text.endswith("\n")


# --- earlier inputs


@driven
async def test_history_walks_and_brings_the_draft_back(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.history = ["first", "second"]
    await write(pilot, "draft")
    seen = []
    for key in ("up", "up", "up", "down", "down", "down"):
        await pilot.press(key)
        seen.append(app.prompt.text)
    assert seen == ["second", "first", "first", "second", "draft", "draft"]


@driven
async def test_history_passes_through_entries_of_several_lines(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.history = ["old", "a\nb\nc"]
    await pilot.press("up")
    assert app.prompt.text == "a\nb\nc"
    await pilot.press("down")
    assert (app.prompt.text, app.editor.cursor_location[0]) == ("a\nb\nc", 1)
    await pilot.press("up", "up")
    assert app.prompt.text == "old"
    await pilot.press("down")
    assert app.prompt.text == "a\nb\nc"
    assert app.editor.cursor_location == (2, 1)
    await pilot.press("down")
    assert app.prompt.text == ""


@driven
async def test_up_and_down_move_inside_a_wrapped_line(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.history = ["old"]
    long = "word " * 30
    app.prompt.set_text(long)
    await pilot.pause()
    await pilot.press("up")
    assert app.prompt.text == long
    await pilot.press("up")
    assert app.prompt.text == "old"


@driven
async def test_changed_entries_are_kept_until_something_is_sent(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.history = ["one", "two"]
    await pilot.press("up", "x", "up", "down")
    assert app.prompt.text == "twox"
    await pilot.press("enter", "up")
    assert app.prompt.history == ["one", "two", "twox"]
    assert app.prompt.text == "twox"
    await pilot.press("up")
    assert app.prompt.text == "two"


@driven
async def test_repetitions_count_once(app: Chat, pilot: Pilot[None], _: Path) -> None:
    app.prompt.history = ["a", "b", "b"]
    await pilot.press("b", "enter")
    assert app.prompt.history == ["a", "b", "b"]
    await pilot.press("up", "up")
    assert app.prompt.text == "a"


@driven
async def test_attachments_of_the_draft_are_not_sent_with_an_entry(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.history = ["old"]
    await paste(app, pilot, "x" * 3000)
    await pilot.press("d", "up")
    assert app.prompt.attachments == ()
    await pilot.press("down")
    assert app.prompt.text == "d"
    assert [a.name for a in app.prompt.attachments] == ["pasted text 1"]


@driven
async def test_an_entry_that_is_a_command_does_not_open_the_list(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.history = ["old", "/mode"]
    await pilot.press("up")
    await settle(pilot)
    assert app.shown == []
    await pilot.press("up")
    assert app.prompt.text == "old"


# --- long pastes


@driven
async def test_a_short_paste_is_text(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await paste(app, pilot, "y" * 2000)
    assert app.prompt.text == "y" * 2000
    app.prompt.clear()
    await paste(app, pilot, "\r\n".join(map(str, range(30))))
    assert app.prompt.text == "\n".join(map(str, range(30)))
    assert app.prompt.attachments == ()


@driven
async def test_a_long_paste_becomes_an_attachment(app: Chat, pilot: Pilot[None], _: Path) -> None:
    app.prompt.count_tokens = lambda text: len(text.split())
    await write(pilot, "see ")
    await paste(app, pilot, "y" * 2001)
    await paste(app, pilot, "\r".join(map(str, range(31))))
    assert app.prompt.text == "see "
    assert app.chips == "[pasted text 1 · 1 token x] [pasted text 2 · 31 tokens x]"
    await pilot.press("enter")
    text, attachments = app.seen[0]
    assert text == "see"
    assert attachments == (
        Attachment("pasted text 1", "y" * 2001, 1),
        Attachment("pasted text 2", "\n".join(map(str, range(31))), 31),
    )
    assert app.prompt.attachments == ()
    await paste(app, pilot, "z" * 2001)
    assert [a.name for a in app.prompt.attachments] == ["pasted text 1"]


@driven
async def test_a_paste_alone_can_be_sent(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await paste(app, pilot, "y" * 2001)
    await pilot.press("enter")
    assert app.seen == [("", (Attachment("pasted text 1", "y" * 2001, 501),))]
    assert app.prompt.history == []


@driven
async def test_backspace_at_the_beginning_removes_the_last(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    await paste(app, pilot, "y" * 2001)
    await paste(app, pilot, "z" * 2001)
    await pilot.press("a", "backspace")
    assert [a.name for a in app.prompt.attachments] == ["pasted text 1", "pasted text 2"]
    await pilot.press("backspace")
    assert [a.name for a in app.prompt.attachments] == ["pasted text 1"]
    await pilot.press("backspace", "backspace")
    assert app.prompt.attachments == ()


@driven
async def test_the_cross_removes_by_mouse(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await paste(app, pilot, "y" * 2001)
    await paste(app, pilot, "z" * 2001)
    row = next(r for r in app.screen_rows() if "pasted text 1" in r)
    y = app.screen_rows().index(row)
    await pilot.click(offset=(row.index("pasted"), y))
    assert len(app.prompt.attachments) == 2
    await pilot.click(offset=(row.index("x]"), y))
    assert [a.name for a in app.prompt.attachments] == ["pasted text 2"]
    await pilot.press("a")
    assert app.prompt.text == "a"


@driven
async def test_undo_right_after_pasting_gives_the_text(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    await pilot.press("a", "b", "left")
    await paste(app, pilot, "y" * 2001)
    await pilot.press("ctrl+z")
    assert app.prompt.text == "a" + "y" * 2001 + "b"
    assert app.chips == ""
    app.prompt.clear()
    await paste(app, pilot, "y" * 2001)
    await pilot.press("a", "ctrl+z")
    assert app.prompt.text == ""
    assert len(app.prompt.attachments) == 1


@driven
async def test_a_huge_paste_stays_an_attachment(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await paste(app, pilot, "y" * 1_000_000)
    await pilot.press("ctrl+z")
    await pilot.pause()
    assert app.prompt.text == ""
    assert [a.tokens for a in app.prompt.attachments] == [250_000]
    assert "too long to edit" in app.seen[0]


@driven
async def test_counting_happens_in_a_worker_and_shows_when_known(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    gate = threading.Event()

    def count(text: str) -> int:
        gate.wait(10)
        return len(text)

    await paste(app, pilot, "y" * 2001)
    assert app.chips == "[pasted text 1 · ~501 tokens x]"
    app.prompt.count_tokens = count
    await pilot.pause()
    assert app.chips == "[pasted text 1 · … x]"
    assert app.prompt.attachments == ()
    await pilot.press("a", "enter", "b")
    assert app.seen == []
    gate.set()
    await settle(pilot)
    assert [(text, [a.tokens for a in files]) for text, files in app.seen] == [("a", [2001])]


@driven
async def test_many_attachments_take_three_rows_at_most(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.set_text("", [Attachment(f"pasted text {n}", "x", n) for n in range(1, 31)])
    await pilot.pause()
    rows = app.chips.splitlines()
    assert len(rows) == app.query_one(Chips).size.height == 3
    assert rows[0].startswith("… ")
    assert rows[-1].endswith("[pasted text 30 · 30 tokens x]")
    assert max(map(len, rows)) <= 76
    shown = app.chips.count("pasted")
    assert rows[0].startswith(f"… {30 - shown} more ")


# --- files


@driven
async def test_files_named_in_the_text_travel_with_it(
    app: Chat, pilot: Pilot[None], folder: Path
) -> None:
    (folder / "notes.txt").write_text("one two")
    (folder / "my file").write_text("three")
    text = 'Compare @notes.txt, @"my file" and @notes.txt; mail me@notes.txt @absent'
    app.prompt.set_text(text)
    await pilot.press("enter")
    await settle(pilot)
    assert app.seen == [
        (text, (Attachment("notes.txt", "one two", 2), Attachment("my file", "three", 2)))
    ]
    assert app.prompt.text == ""
    assert app.chips == ""


@driven
async def test_a_file_is_read_when_its_completion_is_accepted(
    app: Chat, pilot: Pilot[None], folder: Path
) -> None:
    (folder / "notes.txt").write_text("one two")
    app.prompt.count_tokens = lambda text: len(text.split())
    await write(pilot, "see @no")
    await pilot.press("tab")
    await settle(pilot)
    assert app.prompt.text == "see @notes.txt "
    assert app.chips == "[notes.txt · 2 tokens x]"
    (folder / "notes.txt").write_text("changed after that")
    await pilot.press("enter")
    assert app.seen == [("see @notes.txt", (Attachment("notes.txt", "one two", 2),))]


@driven
async def test_a_chip_goes_with_its_name_and_the_at_with_the_chip(
    app: Chat, pilot: Pilot[None], folder: Path
) -> None:
    (folder / "notes.txt").write_text("one two")
    await write(pilot, "@no")
    await pilot.press("tab")
    await settle(pilot)
    await pilot.press("backspace", "backspace")
    await settle(pilot)
    assert app.chips == ""
    app.prompt.set_text("")
    await write(pilot, "a @no")
    await pilot.press("tab")
    await settle(pilot)
    await pilot.press("home", "backspace")
    await settle(pilot)
    assert app.chips == ""
    assert app.prompt.text == "a notes.txt "
    await pilot.press("enter")
    assert app.seen == [("a notes.txt", ())]


@pytest.mark.parametrize("kind", ["binary", "large", "closed", "pipe", "device", "folder"])
def test_what_cannot_be_attached_keeps_the_text(tmp_path: Path, kind: str) -> None:
    name, word = _troublesome(tmp_path, kind)

    async def body(app: Chat, pilot: Pilot[None], _: Path) -> None:
        app.prompt.set_text(f"see @{name} now")
        await pilot.press("enter")
        await settle(pilot)
        assert len(app.seen) == 1
        assert word in app.seen[0]
        assert app.prompt.text == f"see @{name} now"
        assert app.chips == ""
        await pilot.press("x")
        assert app.prompt.text == f"see @{name} nowx"

    driven(body)(tmp_path)


def _troublesome(folder: Path, kind: str) -> tuple[str, str]:
    path = folder / kind
    match kind:
        case "binary":
            path.write_bytes(b"\0\1")
            return kind, "no text"
        case "large":
            path.write_bytes(b"a" * (2 * 1024**2 + 1))
            return kind, "2 MiB"
        case "closed":
            path.touch(mode=0)
            if os.access(path, os.R_OK):
                pytest.skip("this user may read everything")
            return kind, "ermission"
        case "pipe":
            os.mkfifo(path)
            return kind, "device or pipe"
        case "device":
            return "/dev/zero", "device or pipe"
    path.mkdir()
    return "folder/", "it is a folder"


@driven
async def test_escape_stops_sending_while_files_are_read(
    app: Chat, pilot: Pilot[None], folder: Path
) -> None:
    gate = threading.Event()
    (folder / "a").write_text("text")

    def count(text: str) -> int:
        gate.wait(10)
        return len(text)

    app.prompt.count_tokens = count
    app.prompt.set_text("@a")
    await pilot.press("enter")
    await pilot.pause(0.5)
    assert "Esc stops" in app.chips
    await pilot.press("x", "escape")
    assert app.seen == []
    assert "Esc stops" not in app.chips
    gate.set()
    await settle(pilot)
    assert app.seen == []
    assert app.prompt.text == "@a"
    await pilot.press("enter")
    assert app.seen == [("@a", (Attachment("a", "text", 4),))]


@driven
async def test_editing_an_earlier_message(app: Chat, pilot: Pilot[None], folder: Path) -> None:
    (folder / "a.txt").write_text("new content")
    files = (Attachment("a.txt", "old content", 7), Attachment("pasted text 1", "pasted", 3))
    app.prompt.set_text("see @a.txt", files)
    await settle(pilot)
    assert app.chips == "[a.txt · 7 tokens x] [pasted text 1 · 3 tokens x]"
    await paste(app, pilot, "z" * 2001)
    await pilot.press("!", "enter")
    await settle(pilot)
    assert app.seen[0][0] == "see @a.txt!"
    assert app.seen[0][1][:2] == files
    assert app.seen[0][1][2].name == "pasted text 2"


# --- completions


@driven
async def test_commands_are_completed_with_their_arguments(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    await write(pilot, "/")
    assert app.shown == ["/model", "/mode", "/help"]
    await write(pilot, "mo")
    assert app.shown == ["/model", "/mode"]
    await pilot.press("enter")
    await settle(pilot)
    assert app.prompt.text == "/model "
    assert (app.shown, app.chosen) == (["lite", "large"], None)
    await pilot.press("down", "down", "tab")
    await settle(pilot)
    assert app.prompt.text == "/model large"
    assert app.shown == []
    await pilot.press("enter")
    assert app.seen == [("/model large", ())]


@driven
async def test_enter_sends_what_is_complete(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await write(pilot, "/help")
    assert app.shown == ["/help"]
    await pilot.press("enter")
    await write(pilot, "/mode")
    assert (app.shown, app.chosen) == (["/model", "/mode"], "/mode")
    await pilot.press("enter")
    await write(pilot, "/model ")
    await pilot.press("enter")
    assert app.seen == [("/help", ()), ("/mode", ()), ("/model", ())]


@driven
async def test_a_slash_typed_ahead_is_completed_too(app: Chat, pilot: Pilot[None], _: Path) -> None:
    for key in ["/", "h", "enter"]:
        app.post_message(events.Key(key, key if len(key) == 1 else None))
    await settle(pilot)
    assert app.prompt.text == "/help "


@driven
async def test_no_list_where_nothing_begins_so(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await write(pilot, "/home/user")
    assert app.shown == []
    await pilot.press("ctrl+u")
    await write(pilot, "a /m me@x")
    assert app.shown == []


@driven
async def test_the_list_lies_above_and_shifts_nothing(
    app: Chat, pilot: Pilot[None], folder: Path
) -> None:
    for number in range(30):
        (folder / f"file{number:02}").touch()
    await pilot.pause()
    before = (app.prompt.region, app.query_one("#log").region)
    await write(pilot, "@")
    assert (app.prompt.region, app.query_one("#log").region) == before
    assert app.list.content_size.height == 8
    assert app.list.region.bottom == app.prompt.region.y
    assert app.list.region.y >= 0
    assert app.list.region.width == app.prompt.region.width
    rows = app.screen_rows()
    assert [row.strip("│ ")[:8] for row in rows if "file" in row] == [
        "▸ file00",
        *(f"file0{n}  " for n in range(1, 8)),
    ]


@driven
async def test_the_list_lies_below_where_there_is_no_room_above(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    app.prompt.styles.dock = "top"
    await pilot.pause()
    await write(pilot, "/")
    assert app.list.region.y == app.prompt.region.bottom


@driven
async def test_moving_in_the_list(app: Chat, pilot: Pilot[None], folder: Path) -> None:
    for number in range(20):
        (folder / f"file{number:02}").touch()
    app.prompt.history = ["old"]
    await write(pilot, "@")
    places = []
    for key in ("down", "pagedown", "pagedown", "pagedown", "down", "up", "pageup", "up"):
        await pilot.press(key)
        places.append(app.list.index)
        row = next(r for r in app.screen_rows() if "▸" in r)
        assert f"file{app.list.index:02}" in row
    assert places == [1, 9, 17, 19, 0, 19, 11, 10]
    assert app.seen == []
    await pilot.press("enter")
    await settle(pilot)
    assert app.prompt.text == "@file10 "
    assert app.shown == []


@driven
async def test_escape_closes_and_only_the_next_one_goes_on(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    await write(pilot, "/mo")
    await pilot.press("escape")
    assert (app.shown, app.seen) == ([], [])
    await pilot.press("left", "right", "escape")
    assert (app.shown, app.seen) == ([], ["escape"])
    await pilot.press("d")
    assert app.shown == ["/model", "/mode"]
    await pilot.press("escape", "enter")
    assert app.seen == ["escape", ("/mod", ())]


@driven
async def test_tab_opens_the_list_again(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await write(pilot, "/mo")
    await pilot.press("escape", "tab")
    assert app.shown == ["/model", "/mode"]
    assert app.focused is app.editor


@driven
async def test_the_mouse_chooses(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await write(pilot, "/")
    rows = app.screen_rows()
    y = next(y for y, row in enumerate(rows) if "/mode " in row)
    await pilot.click(offset=(10, y))
    await settle(pilot)
    assert app.prompt.text == "/mode "
    assert app.focused is app.editor
    await pilot.press("ctrl+u")
    await write(pilot, "/")
    await pilot._post_mouse_events([events.MouseScrollDown], app.list, (3, 2))
    assert app.chosen == "/mode"


@driven
async def test_folders_are_entered(app: Chat, pilot: Pilot[None], folder: Path) -> None:
    (folder / "my src").mkdir()
    (folder / "my src" / "main.py").write_text("x = 1")
    await write(pilot, "see @my")
    await pilot.press("tab")
    await settle(pilot)
    assert (app.prompt.text, app.shown) == ('see @"my src/', ["main.py"])
    await pilot.press("enter")
    await settle(pilot)
    assert app.prompt.text == 'see @"my src/main.py" '
    assert app.chips == "[my src/main.py · ~2 tokens x]"
    await pilot.press("enter")
    assert app.seen == [('see @"my src/main.py"', (Attachment("my src/main.py", "x = 1", 2),))]


@driven
async def test_completing_in_the_middle_of_a_text(
    app: Chat, pilot: Pilot[None], folder: Path
) -> None:
    (folder / "notes.txt").touch()
    app.prompt.set_text("first\nsee @ now")
    await pilot.press(*["left"] * 4)
    await write(pilot, "no")
    await pilot.press("tab", "x")
    assert app.prompt.text == "first\nsee @notes.txt xnow"


@pytest.mark.parametrize(
    "name", ["new\nline", "[bold]x", "two words", 'quo"te\\', "grün-日本", "\x1b[31mred", "$text"]
)
def test_hostile_names_are_shown_literally_and_attached(tmp_path: Path, name: str) -> None:
    async def body(app: Chat, pilot: Pilot[None], folder: Path) -> None:
        (folder / name).write_text("content")
        await write(pilot, "@")
        assert len(app.shown) == 1
        assert app.shown[0].isprintable()
        assert any(app.shown[0][:7] in row for row in app.screen_rows())
        await pilot.press("tab")
        await settle(pilot)
        assert app.chips.count("\n") == 0
        assert any(app.chips[:8] in row for row in app.screen_rows())
        await pilot.press("enter")
        await settle(pilot)
        assert app.seen[0][1] == (Attachment(name, "content", 2),)

    driven(body)(tmp_path)


@driven
async def test_a_slow_disk_holds_one_thread_and_no_key(
    app: Chat, pilot: Pilot[None], _: Path
) -> None:
    gate, asked = threading.Event(), []

    class Slow(Command):
        def complete(self, prefix: str) -> list[str]:
            asked.append(prefix)
            gate.wait(10)
            return [prefix + "!"]

    app.prompt.commands = [Slow("slow")]
    start = time.perf_counter()
    await pilot.press(*"/slow", "space", *"abcdef")
    assert app.shown == []
    assert time.perf_counter() - start < 5
    assert app.prompt.text == "/slow abcdef"
    assert len(asked) == 1
    gate.set()
    await settle(pilot)
    assert asked[1:] == ["abcdef"]
    assert app.shown == ["abcdef!"]


@driven
async def test_the_list_closes_with_the_focus(app: Chat, pilot: Pilot[None], _: Path) -> None:
    await write(pilot, "/")
    app.query_one(Button).focus()
    await pilot.pause()
    assert app.shown == []

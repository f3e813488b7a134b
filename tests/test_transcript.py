"""The transcript: what it shows, and that what a frame costs does not depend on what lies above."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest
from textual.app import App
from textual.widget import Widget

from tui.widgets.entry import Entry
from tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from textual.app import ComposeResult
    from textual.pilot import Pilot

REPLY = """## Section

A paragraph with **bold** and `code`.

- item one
- item two

```python
def f(x):
    return x + 1
```

"""


class Shown(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def compose(self) -> ComposeResult:
        yield Transcript()

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    def on_transcript_copy(self, event: Transcript.Copy) -> None:
        self.heard.append((event.what, event.text))

    def on_transcript_asked(self, event: Transcript.Asked) -> None:
        self.heard.append((event.what, event.entry.key))

    def on_transcript_branch_asked(self, event: Transcript.BranchAsked) -> None:
        self.heard.append((event.step, event.entry.key))


def in_app(size: tuple[int, int] = (80, 24)) -> Callable[[Any], Callable[..., None]]:
    def wrapped(test: Any) -> Callable[..., None]:
        async def run(*arguments: Any, **keywords: Any) -> None:
            app = Shown()
            async with app.run_test(size=size) as pilot:
                await test(app, pilot, *arguments, **keywords)

        @wraps(test)
        def sync(*arguments: Any, **keywords: Any) -> None:
            asyncio.run(run(*arguments, **keywords))

        sync.__wrapped__ = None  # type: ignore[attr-defined]
        del sync.__wrapped__  # or pytest asks for app and pilot
        return sync

    return wrapped


def conversation(messages: int) -> list[Entry]:
    return [
        Entry(i, "assistant", "Guide", f"number {i}\n\n{REPLY}")
        if i % 2
        else Entry(i, "user", "You", f"question {i}")
        for i in range(messages)
    ]


def screen_lines(app: App[None]) -> list[str]:
    size = app.screen.size
    strips = app.screen._compositor.render_strips(size)
    return [strip.text.rstrip() for strip in strips]


def without_scrollbar(lines: list[str]) -> list[str]:
    return [line[:79].rstrip() for line in lines]


@contextmanager
def drawn_widgets() -> Iterator[list[Widget]]:
    """The widgets whose lines the compositor asks for, once for each time."""
    found: list[Widget] = []
    original = Widget.render_lines

    def render_lines(self: Widget, crop: Any) -> Any:
        found.append(self)
        return original(self, crop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Widget, "render_lines", render_lines)
        yield found


@in_app()
async def test_the_end_is_shown_first(app: Shown, pilot: Pilot[None]) -> None:
    app.transcript.show(conversation(500))
    await pilot.pause()
    lines = screen_lines(app)
    assert any("return x + 1" in line for line in lines[-5:])
    assert not any("question 0" in line for line in lines)


@pytest.mark.parametrize("messages", [2, 500])
def test_a_streamed_piece_draws_one_widget_and_a_block_or_two(messages: int) -> None:
    """The frame budget, in widgets and blocks: the same for 2 messages and for 500."""

    @in_app()
    async def check(app: Shown, pilot: Pilot[None]) -> None:
        transcript = app.transcript
        transcript.show(conversation(messages))
        reply = Entry(messages, "assistant", "Guide")
        reply.streaming = True
        transcript.add(reply)
        await pilot.pause()
        before = transcript.painter.drawn
        frames = 0
        with drawn_widgets() as drawn:
            for _ in range(5):
                for start in range(0, len(REPLY), 20):
                    reply.append(REPLY[start : start + 20])
                    transcript.changed(reply)
                    frames += 1
                    await pilot.pause()
        blocks = transcript.painter.drawn - before
        # Twenty characters end one block at most; the one before it may be drawn once more.
        assert blocks <= 3 * frames
        # The scrollbar follows a new line; the screen draws what lies between the widgets: nothing.
        assert {type(widget).__name__ for widget in drawn} <= {"Transcript", "ScrollBar", "Screen"}
        assert len(drawn) <= 5 * frames

    check()


@in_app()
async def test_scrolling_draws_a_page_or_two_at_a_time(app: Shown, pilot: Pilot[None]) -> None:
    transcript = app.transcript
    transcript.show(conversation(500))
    await pilot.pause()
    transcript.focus()
    blocks_a_message = 5
    for _ in range(20):
        before = transcript.painter.drawn
        transcript.entries[-1].streaming = True  # nothing is measured in the background
        await pilot.press("pageup")
        await pilot.pause()
        # Three pages of 24 lines hold 12 messages at most.
        assert transcript.painter.drawn - before <= 12 * blocks_a_message


@in_app()
async def test_what_is_read_stays_where_it_is_while_a_reply_grows(
    app: Shown, pilot: Pilot[None]
) -> None:
    transcript = app.transcript
    transcript.show(conversation(60))
    await pilot.pause()
    transcript.focus()
    await pilot.press("pageup", "pageup")
    await pilot.pause()
    before = screen_lines(app)
    transcript.entries[-1].append(REPLY * 3)
    transcript.changed(transcript.entries[-1])
    await pilot.pause(0.3)  # and while heights that were guessed become known
    assert without_scrollbar(screen_lines(app)) == without_scrollbar(before)


@in_app()
async def test_the_end_is_followed_again_once_it_is_scrolled_to(
    app: Shown, pilot: Pilot[None]
) -> None:
    transcript = app.transcript
    transcript.show(conversation(60))
    transcript.focus()
    await pilot.press("pageup", "end")
    reply = Entry(60, "assistant", "Guide", "one")
    transcript.add(reply)
    reply.append("\n\ntwo\n\nthe very end")
    transcript.changed(reply)
    await pilot.pause()
    assert any("the very end" in line for line in screen_lines(app))


@in_app()
async def test_guessed_heights_become_exact(app: Shown, pilot: Pilot[None]) -> None:
    transcript = app.transcript
    entries = conversation(80)
    transcript.show(entries)
    for _ in range(100):
        await pilot.pause(0.05)
        if all(entry.is_measured() for entry in entries):
            break
    heights = [len(entry.lines(transcript.painter)) for entry in entries]
    assert transcript.virtual_size.height == sum(heights)


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (20, 6)])
def test_a_streamed_reply_looks_like_the_whole_one(size: tuple[int, int]) -> None:
    @in_app(size)
    async def check(app: Shown, pilot: Pilot[None]) -> None:
        transcript = app.transcript
        reply = Entry(0, "assistant", "Guide")
        transcript.add(reply)
        for start in range(0, 2 * len(REPLY), 7):
            reply.append((2 * REPLY)[start : start + 7])
            transcript.changed(reply)
            reply.lines(transcript.painter)
        await pilot.pause()
        streamed = screen_lines(app)
        transcript.show([Entry(0, "assistant", "Guide", 2 * REPLY)])
        await pilot.pause()
        assert screen_lines(app) == streamed

    check()


@in_app()
async def test_keys_act_on_the_selected_message(app: Shown, pilot: Pilot[None]) -> None:
    entries = conversation(4)
    entries[2].branch = (2, 3)
    app.transcript.show(entries)
    app.transcript.focus()
    await pilot.press("c", "1", "up", "r", "full_stop", "2")
    await pilot.press("up")
    while app.transcript.selected is not entries[2]:
        await pilot.press("up")
    await pilot.press("e", "left", "right")
    await pilot.pause()
    assert app.heard == [
        ("the message", entries[3].content),
        ("code block 1", "def f(x):\n    return x + 1"),
        ("regenerate", 3),
        ("continue", 3),
        ("edit", 2),
        (-1, 2),
        (1, 2),
    ]


@in_app()
async def test_thinking_is_folded_until_a_key_or_a_click_opens_it(
    app: Shown, pilot: Pilot[None]
) -> None:
    entry = Entry(0, "assistant", "Guide", "four", thinking="two and two", thinking_seconds=12.4)
    app.transcript.show([entry])
    app.transcript.focus()
    await pilot.pause()
    assert "▸ thought for 12 s · 3 words" in screen_lines(app)[1]
    assert not any("two and two" in line for line in screen_lines(app))
    await pilot.press("t")
    await pilot.pause()
    assert any("two and two" in line for line in screen_lines(app))
    await pilot.click(Transcript, offset=(5, 1))
    await pilot.pause()
    assert not any("two and two" in line for line in screen_lines(app))


@in_app()
async def test_hostile_text_is_shown_and_not_obeyed(app: Shown, pilot: Pilot[None]) -> None:
    text = "[red]no[/red] \x1b[31mred\x07 \u202egnirts \udcff"
    app.transcript.show([Entry(0, "user", text, text), Entry(1, "assistant", "x", text)])
    await pilot.pause()
    joined = "\n".join(screen_lines(app))
    assert "[red]no[/red]" in joined
    assert "\\x1b[31mred" in joined
    assert not any(c in joined for c in "\x1b\x07\u202e\udcff")


@in_app()
async def test_text_marked_with_the_mouse_can_be_copied(app: Shown, pilot: Pilot[None]) -> None:
    app.transcript.show([Entry(0, "user", "You", "alpha beta gamma")])
    await pilot.pause()
    await pilot.mouse_down(Transcript, offset=(8, 1))
    await pilot.hover(Transcript, offset=(12, 1))
    await pilot.mouse_up(Transcript, offset=(12, 1))
    await pilot.pause()
    assert app.screen.get_selected_text() in ("beta", "beta ")

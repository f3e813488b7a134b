"""The real chat app on the built-in model, driven by Textual's pilot."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from tui.app import ChatApp
from tui.launch import Launch
from tui.store.conversations import ConversationStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from textual.pilot import Pilot

GREEDY = {"temperature": 0.0}


class Driver:
    """The app and its pilot, with what tests do all the time."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    @property
    def chat(self) -> Any:
        return self.app.chat_screen.chat

    @property
    def entries(self) -> list[Any]:
        return self.app.chat_screen.transcript.entries

    @property
    def contents(self) -> list[str]:
        return [entry.content for entry in self.entries]

    def lines(self) -> list[str]:
        strips = self.app.screen._compositor.render_strips(self.app.screen.size)
        return [strip.text.rstrip() for strip in strips]

    def shows(self, text: str) -> bool:
        return any(text in line for line in self.lines())

    async def until(self, condition: Callable[[], Any], seconds: float = 30.0) -> None:
        for _ in range(int(seconds / 0.02)):
            if condition():
                return
            await self.pilot.pause(0.02)
        shown = "\n".join(self.lines())
        raise AssertionError(f"not within {seconds} s: {inspect.getsource(condition)}\n{shown}")

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        await self.press(*("space" if c == " " else _KEYS.get(c, c) for c in text))

    async def send(self, text: str) -> None:
        """Write a line and send it."""
        self.app.chat_screen.prompt.focus()
        self.app.chat_screen.prompt.set_text(text)
        await self.pilot.pause()
        await self.press("enter")

    async def ask(self, text: str) -> str:
        """Send a question, wait for the whole reply and return it."""
        before = self.chat.last_run
        await self.send(text)
        await self.until(lambda: self.chat.last_run is not before)
        await self.answered()
        return str(self.entries[-1].content)

    async def answered(self) -> None:
        await self.until(lambda: self.chat.replying is None)
        await self.pilot.pause()


_KEYS = {"/": "slash", ".": "full_stop", "@": "at", "?": "question_mark", ",": "comma"}


@asynccontextmanager
async def running(
    folder: Path,
    size: tuple[int, int] = (100, 30),
    model: str | None = None,
    given: dict[str, Any] | None = None,
) -> AsyncIterator[Driver]:
    """The app with its chats in `folder`, once its model is loaded."""
    settings = GREEDY if given is None else given
    with ConversationStore(folder / "chats.db") as store:
        app = ChatApp(Launch(model=model, given=settings), store)
        async with app.run_test(size=size, notifications=True) as pilot:
            driver = Driver(app, pilot)
            await driver.until(lambda: app.loaded is not None or len(app.screen_stack) > 2)
            yield driver


def in_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """Run an asynchronous test; its arguments stay fixtures for pytest."""

    @wraps(test)
    def sync(*arguments: Any, **keywords: Any) -> None:
        asyncio.run(test(*arguments, **keywords))

    return sync

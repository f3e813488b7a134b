"""A reply on its way from the engine to the screen and to the store."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tui.store.error import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tui.run import Run
    from tui.store.conversations import ConversationStore
    from tui.store.records import Message
    from tui.widgets.entry import Entry
    from tui.widgets.transcript import Transcript

_SAVE_SECONDS = 1.0
_SHARE = 0.25  # of the app's time at most for drawing what streams


class Writer:
    """Writes messages to the store on a thread of its own, in order, so that no disk delays keys.

    `failed` is called on that thread.
    """

    def __init__(self, store: ConversationStore, failed: Callable[[str], object]) -> None:
        self._store = store
        self._failed = failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._last: Future[None] | None = None

    def update(self, message: int, **changes: Any) -> None:
        """Write a message's new text, finish or figures."""
        self._last = self._thread.submit(self._write, message, changes)

    @property
    def busy(self) -> bool:
        """Whether the last update is still to be written."""
        return self._last is not None and not self._last.done()

    def close(self) -> None:
        """Write what is left."""
        self._thread.shutdown()

    def _write(self, message: int, changes: dict[str, Any]) -> None:
        try:
            self._store.update(message, **changes)
        except StoreError as error:
            self._failed(str(error))


class Replying:
    """Shows what a run adds to a message, and saves it about once a second."""

    def __init__(
        self, run: Run, message: Message, entry: Entry, transcript: Transcript, writer: Writer
    ) -> None:
        self.run = run
        self.message = message
        self.entry = entry
        self._transcript = transcript
        self._writer = writer
        self._saved_at = time.monotonic()
        self._next_draw = 0.0
        self._thought_before = message.thinking_seconds
        entry.streaming = True

    def draw(self) -> None:
        """Show what is new, unless drawing takes too much of the time."""
        started = time.monotonic()
        if started < self._next_draw:
            return
        if self._take():
            self._transcript.changed(self.entry)
        now = time.monotonic()
        self._next_draw = now + (now - started) * (1 / _SHARE - 1)
        if now - self._saved_at >= _SAVE_SECONDS and not self._writer.busy:
            self._saved_at = now
            self._writer.update(self.message.id, **self._texts())

    def end(self, finish: str) -> dict[str, Any]:
        """Show and save the last of it; returns what has changed in the message."""
        self._take()
        self.entry.streaming = False
        self.entry.touch()
        changes = self._texts() | {"finish": finish, "stats": self.run.figures()}
        self._writer.update(self.message.id, **changes)
        return changes

    def _take(self) -> bool:
        content, thinking = self.run.take()
        if not content and not thinking:
            return False
        self.entry.thinking_seconds = self._thought_before + self.run.thinking_seconds
        self.entry.append(content, thinking)
        return True

    def _texts(self) -> dict[str, Any]:
        return {
            "content": self.entry.content,
            "thinking": self.entry.thinking,
            "thinking_seconds": self.entry.thinking_seconds,
        }

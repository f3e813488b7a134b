"""A reply that is being made: the engine's thread writes it, the app reads it."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from localds.session import Stats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from localds.session import Piece
    from localds.thinking import Reply

_PACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Request:
    """What to answer: messages as the chat template takes them, and how.

    `options` are keyword arguments of `Session.generate`. `reply_so_far` goes on where it was cut.
    """

    messages: Sequence[Mapping[str, str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    reply_so_far: Reply | None = None


class Run:
    """One reply. Times are those of `time.perf_counter`.

    `finish` is None while it runs; then "stop", "length", "context", "stopped" or "error: ...".
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.interrupt = threading.Event()
        self.started = time.perf_counter()
        self.first_piece: float | None = None
        self.thinking_ended: float | None = None
        self.prompt_done = 0
        self.prompt_total = 0
        self.stats = Stats()
        self.finish: str | None = None
        self._lock = threading.Lock()
        self._pace: deque[tuple[float, int]] = deque()
        self._content: list[str] = []
        self._thinking: list[str] = []

    def stop(self) -> None:
        """End the reply, soon."""
        self.interrupt.set()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self.interrupt.is_set()

    def put(self, piece: Piece) -> None:
        """Add a piece; by the engine."""
        now = time.perf_counter()
        with self._lock:
            if self.first_piece is None:
                self.first_piece = now
            if piece.kind == "thinking":
                self._thinking.append(piece.text)
                self.thinking_ended = now
            else:
                self._content.append(piece.text)
            self._pace.append((now, self.stats.generated_tokens))
            while self._pace[0][0] < now - _PACE_SECONDS:
                self._pace.popleft()

    def take(self) -> tuple[str, str]:
        """What came since the last time: the answer's text, and what was thought."""
        with self._lock:
            content, self._content = self._content, []
            thinking, self._thinking = self._thinking, []
        return "".join(content), "".join(thinking)

    def show_progress(self, done: int, total: int) -> None:
        """Note how much of the prompt is read; by the engine."""
        self.prompt_done, self.prompt_total = done, total

    @property
    def tokens_per_second(self) -> float:
        """Of late while it runs, of the whole reply after."""
        if self.finish is None:
            with self._lock:
                pace = [*self._pace]
            seconds = pace[-1][0] - pace[0][0] if pace else 0.0
            if seconds > 0:
                return (pace[-1][1] - pace[0][1]) / seconds
        stats = self.stats
        return stats.generated_tokens / stats.decode_seconds if stats.decode_seconds > 0 else 0.0

    @property
    def first_token_seconds(self) -> float | None:
        """From the question to the first text."""
        return None if self.first_piece is None else self.first_piece - self.started

    @property
    def thinking_seconds(self) -> float:
        """How long the model thought, so far."""
        if self.first_piece is None or self.thinking_ended is None:
            return 0.0
        return self.thinking_ended - self.first_piece

    def figures(self) -> dict[str, float]:
        """What is kept with the reply."""
        stats = self.stats
        return {
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "prefill_seconds": stats.prefill_seconds,
            "generated_tokens": stats.generated_tokens,
            "decode_seconds": stats.decode_seconds,
            "first_token_seconds": self.first_token_seconds or 0.0,
        }

"""How far a download is, how fast it comes, and the order to stop it."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from localds.hub.transfer import Watch

_WINDOW = 10.0
"""Seconds over which the speed is an average."""

_SAMPLE = 0.2


class StoppedError(Exception):
    """A download ends because a person wants it to; what came is kept."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A download at one moment.

    `speed` is in bytes a second, `seconds_left` None where it cannot be told. While bytes that are
    here are checked, `checked` of `to_check` are. `note` is the last thing worth knowing.
    """

    total: int = 0
    done: int = 0
    speed: float = 0.0
    seconds_left: float | None = None
    checked: int = 0
    to_check: int = 0
    note: str = ""

    @property
    def share(self) -> float:
        """What is here, from 0 to 1."""
        return self.done / self.total if self.total else 0.0


class Meter(Watch):
    """Counts for another thread to read. Once `stop` is set, whatever comes next raises."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._lock = threading.Lock()
        self._total = self._done = self._checked = self._to_check = 0
        self._note = ""
        self._samples: deque[tuple[float, int]] = deque()

    def begin(self, total: int, done: int) -> None:
        """Start to count at `done` of `total` bytes."""
        with self._lock:
            self._total, self._done = total, done
            self._restart()
        self.go_on()

    def advance(self, size: int) -> None:
        """Count bytes that came, or take away what must come again."""
        with self._lock:
            self._done += size
            self._to_check = 0
            if size < 0:
                self._restart()
            now = time.monotonic()
            if now - self._samples[-1][0] >= _SAMPLE:
                self._samples.append((now, self._done))
                while now - self._samples[0][0] > _WINDOW and len(self._samples) > 2:
                    self._samples.popleft()
            if size > 0:
                self._note = ""
        self.go_on()

    def check(self, name: str, size: int) -> None:  # noqa: ARG002  the bar names the model
        """Count what is checked from the start."""
        with self._lock:
            self._checked, self._to_check = 0, size

    def checked(self, size: int) -> None:
        """Count what was checked."""
        with self._lock:
            self._checked += size
            if self._checked >= self._to_check:
                self._restart()
        self.go_on()

    def note(self, line: str) -> None:
        """Keep the line until bytes come."""
        with self._lock:
            self._note = line
        self.go_on()

    def go_on(self) -> None:
        """Raise `StoppedError` where the download is to end."""
        if self._stop.is_set():
            raise StoppedError

    def read(self) -> Reading:
        """How far it is now. May be called from any thread."""
        with self._lock:
            speed = self._speed()
            left = (self._total - self._done) / speed if speed > 0 else None
            checking = self._checked < self._to_check
            return Reading(
                self._total,
                self._done,
                speed,
                left,
                self._checked,
                self._to_check if checking else 0,
                self._note,
            )

    def _restart(self) -> None:
        """Measure the speed from here on."""
        self._samples = deque([(time.monotonic(), self._done)])

    def _speed(self) -> float:
        if not self._samples:
            return 0.0
        began, done = self._samples[0]
        seconds = time.monotonic() - began
        return max(self._done - done, 0) / seconds if seconds >= _SAMPLE else 0.0

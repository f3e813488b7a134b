"""Giving way when other programs take memory, and taking it back when they leave."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 0.5
"""Between looks: memory fills at a few gigabytes a second at most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Slots of a pool: never fewer than `least`. `reserve` bytes of memory are left to others."""

    slot_bytes: int
    least: int
    reserve: int


def follow(limits: Limits, slots: int, wanted: int, room: int) -> int:
    """Slots to have when there are `slots` now, and `room` bytes more could be taken.

    Shrinks where less than the reserve is left, grows towards `wanted` where there is twice the
    reserve; in between nothing changes, so that a pool does not swing.
    """
    slots = min(slots, wanted)
    if room < limits.reserve:
        missing = -(-(limits.reserve - room) // limits.slot_bytes)
        return max(slots - missing, min(limits.least, wanted))
    spare = (room - 2 * limits.reserve) // limits.slot_bytes
    return min(slots + max(spare, 0), wanted)


class PressureWatch:
    """A thread that looks at the machine's memory twice a second.

    `room()` gives the bytes that may still be taken, None where that is not known (an `OSError`
    tells as little); `resize(slots)` is called with what `follow` says when it changes.
    """

    def __init__(
        self,
        limits: Limits,
        wanted: int,
        room: Callable[[], int | None],
        resize: Callable[[int], None],
    ) -> None:
        self._limits = limits
        self._room = room
        self._resize = resize
        self._lock = threading.Lock()
        self._slots = self._wanted = wanted
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)

    @property
    def slots(self) -> int:
        """Slots that there are now."""
        return self._slots

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def set_wanted(self, slots: int) -> None:
        """Have `slots` from now on, as far as others leave memory for them."""
        with self._lock:
            self._slots = self._wanted = slots
            self._resize(slots)

    def look(self) -> None:
        """Look once."""
        try:
            room = self._room()
        except OSError:
            return
        if room is None:
            return
        with self._lock:
            slots = follow(self._limits, self._slots, self._wanted, room)
            if slots != self._slots:
                self._slots = slots
                self._resize(slots)

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS):
            self.look()

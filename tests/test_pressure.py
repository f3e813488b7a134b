"""Giving way to other programs, by numbers."""

import threading

import pytest

from localds.memory.pressure import Limits, PressureWatch, follow

LIMITS = Limits(slot_bytes=10, least=4, reserve=100)


@pytest.mark.parametrize(
    ("slots", "room", "expected"),
    [
        (50, 100, 50),  # exactly the reserve is left
        (50, 99, 49),  # a byte too little: one slot
        (50, 50, 45),
        (50, 0, 40),
        (6, 0, 4),  # never below the least
        (50, 199, 50),  # between the reserve and twice of it nothing changes
        (50, 209, 50),
        (50, 210, 51),
        (50, 1000, 80),  # never above what is wanted
        (80, 1000, 80),
        (90, 150, 80),
    ],
)
def test_follow(slots: int, room: int, expected: int) -> None:
    assert follow(LIMITS, slots, wanted=80, room=room) == expected


def test_following_comes_to_rest() -> None:
    """Memory that is given back is what others may take, and no more is asked for again."""
    slots, others = 80, 500
    for _ in range(10):
        room = 1000 - others - 10 * slots
        slots = follow(LIMITS, slots, wanted=80, room=room)
    assert slots == (1000 - others - LIMITS.reserve) // 10
    assert follow(LIMITS, slots, wanted=80, room=1000 - others - 10 * slots) == slots


def test_watch_resizes_once_for_every_change() -> None:
    rooms = iter([150, 50, 150, None, 500])
    sizes: list[int] = []
    watch = PressureWatch(LIMITS, 80, lambda: next(rooms), sizes.append)
    for _ in range(5):
        watch.look()
    assert sizes == [75, 80]
    watch.set_wanted(20)
    assert sizes[-1] == watch.slots == 20


def test_watch_passes_over_what_cannot_be_read() -> None:
    rooms: list[int | OSError] = [OSError("no /proc"), 50]
    sizes: list[int] = []

    def room() -> int:
        found = rooms.pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    watch = PressureWatch(LIMITS, 80, room, sizes.append)
    watch.look()
    assert sizes == []
    watch.look()
    assert sizes == [75]


def test_watch_stops() -> None:
    watch = PressureWatch(LIMITS, 80, lambda: None, lambda _: None)
    watch.stop()
    watch.start()
    watch.stop()
    assert "memory watch" not in [thread.name for thread in threading.enumerate()]

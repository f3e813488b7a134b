"""Walking through earlier inputs, without losing what is being written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

State = TypeVar("State")


@dataclass(slots=True)
class InputHistory(Generic[State]):
    """A place among earlier inputs; behind the newest stands the draft.

    What was changed at a place is kept there until `reset`. `State` is what an editor holds.
    """

    _place: int | None = None  # None at the draft.
    _kept: dict[int, State] = field(default_factory=dict)

    def step(self, entries: list[str], step: int, text: str, state: State) -> State | str | None:
        """Go `step` (-1: earlier, 1: later) from an editor that shows `text` and holds `state`.

        The state that was kept at the new place, or the entry there; None at either end. Entries
        equal to `text` are passed over.
        """
        here = len(entries) if self._place is None else min(self._place, len(entries))
        place = here + step
        while 0 <= place < len(entries) and entries[place] == text and place not in self._kept:
            place += step
        if not 0 <= place <= len(entries):
            return None
        self._kept[here] = state
        self._place = None if place == len(entries) else place
        if place in self._kept:
            return self._kept[place]
        return entries[place] if place < len(entries) else ""

    def reset(self) -> None:
        """Back to the draft, forgetting what was kept."""
        self._place = None
        self._kept.clear()

"""How fast a run goes, and how long it will take."""

from __future__ import annotations

import time
from collections import deque
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localds.finetune.loop.protocols import Batches

_REMEMBERED_STEPS = 20


class Pace:
    """Times steps, and the time since the last checkpoint, in seconds."""

    def __init__(self, batches: Batches, steps: int) -> None:
        lengths = (batches.length_at(step) for step in range(steps))
        self._lengths_before = [0, *accumulate(lengths)]
        self._per_length: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._begun = self._saved = time.monotonic()

    def begin_step(self) -> None:
        """A step begins."""
        self._begun = time.monotonic()

    def end_step(self, length: int) -> float:
        """A step over rows of a length ends; the seconds it took."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        self._per_length.append(seconds / length)
        return seconds

    def seconds_left(self, step: int) -> float:
        """From the end of `step` steps, as long as longer rows take proportionally longer."""
        left = self._lengths_before[-1] - self._lengths_before[step]
        return median(self._per_length) * left

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.monotonic()

    def since_save(self) -> float:
        """Seconds since the last checkpoint."""
        return time.monotonic() - self._saved

"""The learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localds.finetune.loop.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Schedule:
    """A linear warmup, then a fall towards the floor that the step after the last would reach."""

    settings: TrainSettings
    steps: int

    @property
    def warmup_steps(self) -> int:
        """Steps before the one that has the full learning rate for the first time."""
        return min(math.ceil(self.settings.warmup * self.steps), self.steps - 1)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        peak, floor = self.settings.learning_rate, self.settings.floor
        warmup = self.warmup_steps
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        done = (step - warmup) / (self.steps - warmup)
        return peak * (floor + (1 - floor) * self._left(done))

    def _left(self, done: float) -> float:
        if self.settings.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1 - done if self.settings.schedule == "linear" else 1.0

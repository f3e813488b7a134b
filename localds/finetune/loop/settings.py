"""How a run trains: declared once, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["cosine", "linear", "constant"]
Moments = Literal["adamw", "adamw8bit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The settings of a run. Raises `ValueError` naming the field and the value.

    Those below `seed` may change when a run is resumed: they alter none of its losses.
    """

    steps: int | None = None
    """Optimizer steps; None: as many as `epochs` take."""
    epochs: float = 1.0
    """How often every example is seen, where `steps` is None."""
    accumulation: int = 1
    """Micro-batches of one optimizer step."""
    learning_rate: float = 2e-4
    """The highest learning rate, reached at the end of the warmup."""
    schedule: Decay = "cosine"
    """How the learning rate falls after the warmup."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises linearly."""
    floor: float = 0.0
    """Share of the learning rate that the schedule falls to."""
    optimizer: Moments = "adamw"
    """`adamw8bit` keeps both moments in 8 bits (arXiv:2110.02861)."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; on A and B, not on DoRA's row lengths."""
    clip: float | None = 1.0
    """The highest global norm of a step's gradients; None: not clipped."""
    seed: int = 0
    """Of the first adapters and of dropout."""

    evaluate_every: int | None = None
    """Steps between evaluations; None: only at the end. There is none without held-out data."""
    patience: int | None = None
    """Evaluations in a row without a lower loss after which training stops; None: it does not."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: by time alone."""
    checkpoint_minutes: float | None = 10.0
    """Minutes between checkpoints; None: by steps alone."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    tensorboard: bool = False
    """Also write TensorBoard's event files."""

    def __post_init__(self) -> None:
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "above 0")
        self._check("epochs", 0 < self.epochs < math.inf, "above 0")
        self._check("epsilon", 0 < self.epsilon < math.inf, "above 0")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        self._check("seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")
        for share in ("warmup", "floor"):
            self._check(share, 0 <= getattr(self, share) <= 1, "from 0 to 1")
        for beta in ("beta1", "beta2"):
            self._check(beta, 0 <= getattr(self, beta) < 1, "at least 0 and below 1")
        for count in ("accumulation", "keep_checkpoints"):
            self._check(count, getattr(self, count) >= 1, "at least 1")
        for count in ("steps", "evaluate_every", "patience", "checkpoint_every"):
            given = getattr(self, count)
            self._check(count, given is None or given >= 1, "at least 1, or None")
        for limit in ("clip", "checkpoint_minutes"):
            given = getattr(self, limit)
            self._check(limit, given is None or 0 < given < math.inf, "above 0, or None")
        self._check("schedule", self.schedule in ("cosine", "linear", "constant"), _choice(Decay))
        self._check("optimizer", self.optimizer in ("adamw", "adamw8bit"), _choice(Moments))

    def _check(self, name: str, fits: bool, rule: str) -> None:
        if not fits:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """The optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * steps_per_epoch))


def _choice(literal: object) -> str:
    return "one of " + ", ".join(literal.__args__)  # type: ignore[attr-defined]


MAY_CHANGE = (
    "evaluate_every",
    "patience",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "tensorboard",
)
"""The settings that a resumed run may have changed."""

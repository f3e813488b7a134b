"""What a run tells while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

Reason = Literal["finished", "interrupted", "no improvement"]


@dataclass(frozen=True, slots=True)
class Resumed:
    """Training goes on after `step` steps."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Progress:
    """Within a step, or within an evaluation after `step` steps: batches done, of how many."""

    doing: Literal["step", "evaluation"]
    step: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """`step` steps are done; the last had these figures."""

    step: int
    steps: int
    """Of the whole run."""
    loss: float
    """Per counted token."""
    lr: float
    grad_norm: float
    """Before clipping."""
    counted: int
    """Tokens whose loss counted."""
    tokens: int
    """Tokens computed, without padding."""
    tokens_per_second: float
    peak_memory: int
    """The most that MLX held in this step, in bytes."""
    balance: dict[str, float]
    """What the model reports of its router."""
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """The step was not taken: the parameters stay as they were."""

    step: int
    reason: str
    loss: float
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out data after `step` steps."""

    step: int
    loss: float
    """Per counted token."""
    perplexity: float
    counted: int
    best: bool
    """The lowest loss so far."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint after `step` steps lies complete on the disk."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The run ended after `step` steps."""

    step: int
    reason: Reason


Event: TypeAlias = Resumed | Progress | StepDone | Skipped | Evaluated | Saved | Note | Stopped

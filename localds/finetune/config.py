"""What is trained, and how: the choices that a run's adapter folder remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Method = Literal["lora", "rslora", "dora"]

ATTENTION = (
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "k_proj",
    "v_proj",
    "o_proj",
)
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
EXPERTS = "experts"
ROUTER = "router"
TARGETS = (*ATTENTION, *FEED_FORWARD, EXPERTS, ROUTER)
"""What adapters can be trained on: names of projections as in the checkpoints.

`gate_proj`, `up_proj` and `down_proj` are those of dense layers and of the shared expert; `experts`
are all three of the routed experts, `router` is the matrix that chooses them.
"""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): W + scale * B A, A [rank, in], B [out, rank].

    `scale` is alpha / rank, with "rslora" alpha / sqrt(rank) (arXiv:2312.03732). "dora"
    (arXiv:2402.09353) learns the length of each row of W + scale * B A besides. Raises `ValueError`
    naming the field and the value.
    """

    rank: int = 16
    alpha: float = 32.0
    method: Method = "lora"
    targets: tuple[str, ...] = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise ValueError(f"rank is {self.rank}; it must be from 1 to 1024")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        if self.method not in ("lora", "rslora", "dora"):
            raise ValueError(f"method {self.method!r} is unknown; choose lora, rslora or dora")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(
                f"targets: {', '.join(unknown) or 'none are given'}; choose from "
                f"{', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)

"""All that can be chosen about a training run, but for the model, the data and the folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from localds.finetune.config import AdapterConfig
from localds.finetune.loop.settings import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The choices of `finetune`. Raises `ValueError` naming the field and the value."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainSettings = field(default_factory=TrainSettings)
    """Steps and epochs, learning rate, optimizer and so on. Its `accumulation` is planned."""
    batch: int = 8
    """Rows of an optimizer step; how many of them are computed at once is planned."""
    lengths: tuple[int, ...] = (2048,)
    """Tokens in a row: one length, or those of a curriculum, ascending."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which messages of a conversation count in the loss."""
    packing: bool = True
    """Put several examples into a row."""
    evaluation_share: float = 0.05
    """The share of the examples that is kept for evaluation where no data are given for that."""
    checkpointing: bool | None = None
    """Keep of each layer only its input and compute it again; None: where memory asks for it."""
    device: str = "auto"
    """"auto", "gpu" or "cpu"."""
    vram: int | str | None = None
    """Bytes of the GPU's memory, or a size such as "8GiB"; None: what is free, less a reserve."""
    ram: int | str | None = None
    """The same of the machine's memory."""
    gguf: bool = True
    """Write the adapter as a GGUF file besides."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            text = ",".join(map(str, self.lengths))
            raise ValueError(f"lengths are {text!r}; give one, or several that rise")
        if self.lengths[0] < 8:
            raise ValueError(f"length is {self.lengths[0]}; it must be at least 8")
        if not 0 <= self.evaluation_share < 1:
            raise ValueError(
                f"evaluation_share is {self.evaluation_share}; it must be at least 0 and below 1"
            )
        if self.training.accumulation != 1:
            raise ValueError("accumulation is planned: give batch, the rows of a whole step")

"""Models to GGUF files, quantized: checkpoints in safetensors, and GGUF files anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convert.checkpoint import Checkpoint, CheckpointError
from convert.job import Job, Progress, StoppedError
from convert.merge import merge_adapters
from convert.open import open_checkpoint, open_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convert.pipeline import Importance
    from convert.source import Source

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Job",
    "Progress",
    "StoppedError",
    "convert",
    "convert_checkpoint",
    "merge_adapters",
    "open_source",
]


def convert(
    source: Source,
    output: Path,
    *,
    recipe: str = "Q4_K_M",
    keep: Sequence[str] = (),
    importance: Importance | None = None,
    split: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `source` as a GGUF file `output` with types after `recipe`; returns the files' paths.

    `keep` are rules "PATTERN=TYPE" that go before the recipe, `split` the most bytes of one file.
    `Job.run` says what `resume` and `force` do and what is left behind where it fails; `Job.plan`
    and `Job.run` name the errors.
    """
    job = Job.plan(source, output, recipe=recipe, keep=keep, importance=importance, split=split)
    return job.run(resume=resume, force=force, progress=progress)


def convert_checkpoint(folder: Path, output: Path, *, pre: str | None = None) -> None:
    """Convert the checkpoint in `folder` to a float32 GGUF file, which may exist already.

    `pre` names the tokenizer's splitter (`tokenizer.ggml.pre`); None looks for it.
    """
    convert(open_checkpoint(folder, pre=pre), output, recipe="F32", force=True)

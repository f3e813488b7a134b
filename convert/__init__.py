"""Published checkpoints (safetensors) to GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convert.checkpoint import Checkpoint, CheckpointError
from convert.config import language_model
from convert.describe import checkpoint_metadata
from convert.metadata import ARCHITECTURES, model_class
from convert.tensors import plan
from convert.writer import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Checkpoint", "CheckpointError", "convert_checkpoint"]

FILE_TYPE_F32 = 0


def convert_checkpoint(folder: Path, output: Path, *, pre: str | None = None) -> None:
    """Convert the checkpoint in `folder` to a float32 GGUF file.

    `pre` names the tokenizer's splitter (`tokenizer.ggml.pre`); None looks for it. `output` is
    replaced once the file is complete. Raises `CheckpointError` for a checkpoint that is damaged
    or of an unknown kind, before anything is written.
    """
    checkpoint = Checkpoint(folder)
    architecture = ARCHITECTURES[model_class(language_model(checkpoint.config))]
    targets = plan(checkpoint)
    metadata = checkpoint_metadata(checkpoint, targets, pre=pre)
    metadata["general.file_type"] = FILE_TYPE_F32
    partial = output.with_name(output.name + ".part")
    try:
        write_gguf(partial, architecture, metadata, targets)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)

"""Published checkpoints (safetensors) to GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convert.checkpoint import Checkpoint, CheckpointError
from convert.metadata import ARCHITECTURES, Value, architecture_metadata, model_class
from convert.tensors import plan
from convert.vocabulary import read_vocabulary
from convert.writer import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Checkpoint", "CheckpointError", "convert_checkpoint"]

FILE_TYPE_F32 = 0
QUANTIZATION_VERSION = 2


def convert_checkpoint(folder: Path, output: Path, *, pre: str) -> None:
    """Convert the checkpoint in `folder` to a float32 GGUF file.

    `pre` names the tokenizer's splitter (`tokenizer.ggml.pre`). `output` is replaced once the
    file is complete. Raises `CheckpointError` for a checkpoint that is damaged or of an unknown
    kind, before anything is written.
    """
    checkpoint = Checkpoint(folder)
    architecture = ARCHITECTURES[model_class(checkpoint.config)]
    general: dict[str, Value] = {
        "general.type": "model",
        "general.name": folder.resolve().name,
        "general.file_type": FILE_TYPE_F32,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    metadata = general | architecture_metadata(checkpoint.config)
    vocabulary = read_vocabulary(folder, checkpoint.config, pre)
    targets = plan(checkpoint)
    partial = output.with_name(output.name + ".part")
    try:
        write_gguf(partial, architecture, metadata, vocabulary, targets)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)

"""Every metadata key of a checkpoint's GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convert.general import general_metadata
from convert.metadata import architecture_metadata, model_class
from convert.vocabulary import tokenizer_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convert.checkpoint import Checkpoint
    from convert.source import Target, Value


def checkpoint_metadata(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    *,
    mtp: bool = False,
    pre: str | None = None,
    source: str | None = None,
    revision: str | None = None,
) -> dict[str, Value]:
    """Everything but what follows from the recipe: `general.*`, the architecture's keys, tokenizer.

    `targets` are the tensors of the file, whose parameters are counted; `mtp` says whether
    multi-token-prediction layers are among them. `pre` names the tokenizer's splitter where it
    cannot be found. `source` and `revision` are the hub repository and commit of the checkpoint;
    for a folder in the hub's cache they are found. Raises `CheckpointError` for anything that is
    missing, damaged, or that GGUF cannot express.
    """
    config = checkpoint.text
    name = model_class(config)
    return (
        general_metadata(checkpoint.folder, config, targets, source, revision)
        | architecture_metadata(config, mtp=mtp)
        | tokenizer_metadata(checkpoint.folder, checkpoint.config, name, pre)
    )

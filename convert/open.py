"""Opening whatever the user names as the source of a conversion."""

from __future__ import annotations

import re
from pathlib import Path

from convert.checkpoint import Checkpoint, CheckpointError
from convert.config import Config, language_model, read_json
from convert.describe import checkpoint_metadata
from convert.gguf_source import open_gguf
from convert.metadata import ARCHITECTURES, architecture_metadata, model_class
from convert.quantization import read_quantization
from convert.source import Source
from convert.tensors import omissions, plan
from convert.vocabulary import tokenizer_metadata

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^@\s]+))?")


def open_source(
    name: str,
    *,
    mtp: bool = False,
    requantize: bool = False,
    keep_types: bool = False,
    pre: str | None = None,
) -> Source:
    """The model that `name` stands for, checked as far as that goes without reading the weights.

    `name` is a checkpoint folder, a GGUF file, or a model on the hub ("owner/name", with
    "@revision" if not the newest), which is downloaded. `mtp` keeps a checkpoint's
    multi-token-prediction layers, `requantize` accepts a GGUF file of fewer than 8 bits,
    `keep_types` has one's tensors copied that keep their types, `pre` names a checkpoint's splitter
    of text where it cannot be found. Raises `CheckpointError` for a
    source that does not exist, is damaged, or of an unknown kind.
    """
    path, hub_name = Path(name), HUB_NAME.fullmatch(name)
    if path.is_file():
        return open_gguf(path, requantize=requantize, keep_types=keep_types)
    if path.is_dir():
        return open_checkpoint(path, mtp=mtp, pre=pre)
    if hub_name is None:
        raise CheckpointError(
            f"{name}: no such folder or file; convert takes a checkpoint folder, a GGUF file, or "
            "the name of a model on the hub, such as deepseek-ai/DeepSeek-V2-Lite"
        )
    # The hub's library takes long to import, and most conversions have no use for it.
    from convert.hub import fetch

    snapshot = fetch(hub_name[1], hub_name[2], lambda folder: _check(folder, mtp=mtp, pre=pre))
    return open_checkpoint(
        snapshot.folder,
        mtp=mtp,
        pre=pre,
        repository=snapshot.repository,
        revision=snapshot.revision,
    )


def _check(folder: Path, *, mtp: bool, pre: str | None) -> None:
    """Raise for a checkpoint that cannot be converted, before its weights are downloaded."""
    config = language_model(Config(read_json(folder / "config.json")))
    read_quantization(config)
    architecture_metadata(config, mtp=mtp)
    tokenizer_metadata(folder, config, model_class(config), pre)


def open_checkpoint(
    folder: Path,
    *,
    mtp: bool = False,
    pre: str | None = None,
    repository: str | None = None,
    revision: str | None = None,
) -> Source:
    """The checkpoint in `folder`; `repository` and `revision` are what the hub calls it.

    `pre` names the tokenizer's splitter where it cannot be found.
    """
    checkpoint = Checkpoint(folder)
    targets = plan(checkpoint, mtp=mtp)
    architecture = ARCHITECTURES[model_class(checkpoint.config)]
    metadata = checkpoint_metadata(
        checkpoint, targets, mtp=mtp, pre=pre, source=repository, revision=revision
    )
    return Source(folder, architecture, metadata, targets, omissions(checkpoint, mtp=mtp))

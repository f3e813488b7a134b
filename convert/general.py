"""The `general.*` keys that name a model, and where it came from (`localds.*`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from convert.model_card import card_metadata, read_card, sampling_metadata
from convert.model_name import parse_name, size_label, title

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convert.config import Config
    from convert.source import Target, Value

QUANTIZATION_VERSION = 2


def general_metadata(
    folder: Path,
    config: Config,
    targets: Sequence[Target],
    source: str | None,
    revision: str | None,
) -> dict[str, Value]:
    """The `general.*` keys of the checkpoint in `folder`, and its provenance.

    What the model card says counts first, then the config's `_name_or_path`, then the name of the
    hub repository `source` or of the folder.
    """
    source, revision = source or _cached_repository(folder), revision or _cached_revision(folder)
    total, shared, per_expert, experts = count_parameters(targets)
    keys: dict[str, Value] = {"general.type": "model"}
    keys |= card_metadata(read_card(folder), total)
    path = config.text("_name_or_path", "")
    named = [path] if path and path.count("/") <= 1 else []
    for name in [*named, source or folder.resolve().name]:
        keys = _name_metadata(name, total) | keys
    if total:
        keys.setdefault("general.size_label", size_label(shared, per_expert, experts))
    keys |= sampling_metadata(folder)
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys | _provenance(keys, source, revision, folder)


def count_parameters(targets: Sequence[Target]) -> tuple[int, int, int, int]:
    """Parameters in all, outside of routed experts, in one expert of all layers; and experts."""
    stacks = [target for target in targets if "_exps." in target.name]
    total = sum(math.prod(target.shape) for target in targets)
    routed = sum(math.prod(target.shape) for target in stacks)
    per_expert = sum(math.prod(target.shape[1:]) for target in stacks)
    experts = sum(target.shape[0] for target in stacks) // len(stacks) if stacks else 0
    return total, total - routed, per_expert, experts


def _name_metadata(name: str, parameters: int) -> dict[str, Value]:
    parsed = parse_name(name, parameters)
    keys = {
        "name": title(parsed.full),
        "organization": title(parsed.organization) if parsed.organization is not None else None,
        "basename": parsed.basename,
        "finetune": parsed.finetune,
        "version": parsed.version,
        "size_label": parsed.size_label,
    }
    return {f"general.{key}": value for key, value in keys.items() if value is not None}


def _provenance(
    keys: dict[str, Value], source: str | None, revision: str | None, folder: Path
) -> dict[str, Value]:
    """Which checkpoint the file was made from; the path of a folder is nobody else's business."""
    found: dict[str, Value] = {"localds.source": source or folder.resolve().name}
    if revision is not None:
        found["localds.revision"] = revision
    if source is not None and "general.source.repo_url" not in keys:
        found["general.source.repo_url"] = f"https://huggingface.co/{source}"
    return found


def _cached_repository(folder: Path) -> str | None:
    """The repository of a folder inside the hub's cache: models--OWNER--NAME/snapshots/REVISION."""
    cache = folder.resolve().parent
    kind, _, name = cache.parent.name.partition("--")
    return name.replace("--", "/", 1) if cache.name == "snapshots" and kind == "models" else None


def _cached_revision(folder: Path) -> str | None:
    return folder.resolve().name if _cached_repository(folder) else None

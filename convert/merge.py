"""Adapters merged into a source's tensors, block by block as they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from localds.adapters import Base, patches, read_adapters

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convert.source import Source, Target
    from localds.adapters import Floats
    from localds.adapters.merge import Patch


def merge_adapters(source: Source, named: Sequence[tuple[str | Path, float]]) -> Source:
    """The source with adapters, each given by its path and scale, in the tensors that they change.

    Its name gets theirs behind it, and `localds.adapters` tells them exactly. Raises
    `AdapterError` for an adapter that is broken or another model's.
    """
    base = base_of(source)
    adapters = read_adapters(named, base)
    found = patches(base, adapters)
    names = [adapter.name for adapter, _ in adapters]
    facts = [f"{adapter.name} {scale!r} {adapter.digest()}" for adapter, scale in adapters]
    metadata = {**source.metadata, "localds.adapters": facts}
    metadata["general.name"] = " + ".join([str(metadata.get("general.name", "model")), *names])
    targets = [
        _merged(target, found[target.name]) if target.name in found else target
        for target in source.targets
    ]
    return replace(source, metadata=metadata, targets=targets)


def base_of(source: Source) -> Base:
    """What adapters of the model in a source must fit."""

    def number(key: str, default: int) -> int:
        value = source.metadata.get(f"{source.architecture}.{key}", default)
        return int(value) if isinstance(value, int) else default

    heads = number("attention.head_count", 1)
    return Base(
        name=str(source.path),
        architecture=source.architecture,
        layers=number("block_count", 0) - number("nextn_predict_layers", 0),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        shapes={target.name: target.shape for target in source.targets},
    )


def _merged(target: Target, patch: Patch) -> Target:
    def rows(matrix: int, start: int, stop: int) -> Floats:
        return patch.rows(target.read, matrix, start, stop)

    return replace(target, read=rows, read_raw=None)

"""Which type each tensor gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localds.gguf import GGMLType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convert.pipeline import Importance
    from convert.source import Source

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}


def choose_types(
    source: Source, recipe: str, _keep: Sequence[str], _importance: Importance | None
) -> list[GGMLType]:
    """The type of each of `source.targets`, in order."""
    file_type(recipe)
    return [
        GGMLType[recipe] if len(target.shape) > 1 else GGMLType.F32 for target in source.targets
    ]


def file_type(recipe: str) -> int:
    """The value of `general.file_type` for a recipe."""
    if recipe not in FILE_TYPES:
        raise ValueError(f"--type: {recipe!r} is none of {', '.join(FILE_TYPES)}")
    return FILE_TYPES[recipe]

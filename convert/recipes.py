"""Recipes: a preset or a size to meet, and rules of the user's for single tensors."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from convert.fit import fit_types, is_fit
from convert.presets import (
    FLOATS,
    PRESETS,
    find_preset,
    is_quantized,
    preset_types,
)
from localds.gguf import GGMLType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convert.pipeline import Importance
    from convert.source import Source, Target

AS_STORED = "as stored"
"""The recipe by which tensors keep the types that they have in a GGUF file."""


def choose_types(
    source: Source, recipe: str, keep: Sequence[str], importance: Importance | None
) -> list[GGMLType]:
    """The type of each of `source.targets`, in order: after the recipe, then `keep`.

    A recipe is a preset, `fit:SIZE` or `AS_STORED`. Raises `ValueError` for one that is not known
    or cannot be met, and for a rule of `keep` that makes no sense for the model.
    """
    kept = apply_keeps(source.targets, keep)
    if is_fit(recipe):
        return fit_types(source, recipe, kept, importance)
    if recipe == AS_STORED:
        stored = [GGMLType[target.stored] for target in source.targets]
        return [rule or kind for rule, kind in zip(kept, stored, strict=True)]
    types = preset_types(source, find_preset(recipe), has_importance=importance is not None)
    return [rule or kind for rule, kind in zip(kept, types, strict=True)]


def file_type(recipe: str, types: Sequence[GGMLType]) -> int:
    """The value of `general.file_type`: a preset's, else that of the commonest block type's."""
    if not is_fit(recipe) and recipe != AS_STORED:
        return PRESETS[find_preset(recipe)].file_type
    commonest = Counter(kind for kind in types if kind not in FLOATS).most_common(1)
    base = commonest[0][0] if commonest else GGMLType.F32
    return next(preset.file_type for preset in PRESETS.values() if preset.base is base)


def apply_keeps(targets: Sequence[Target], keeps: Sequence[str]) -> list[GGMLType | None]:
    """Types by `--keep REGEX=TYPE`: the regex is searched in the tensors' names, the last wins.

    Tensors that no rule names have None.

    Raises `ValueError` for one that is malformed, matches nothing, or does not fit the rows.
    """
    result: list[GGMLType | None] = [None] * len(targets)
    for keep in keeps:
        pattern, kind = parse_keep(keep)
        matches = [i for i, target in enumerate(targets) if pattern.search(target.name)]
        chosen = [i for i in matches if is_quantized(targets[i])]
        if not chosen:
            reason = "matches only norms, routers and vectors" if matches else "matches no tensor"
            raise ValueError(f"--keep {keep}: {pattern.pattern!r} {reason} of this model")
        for i in chosen:
            if targets[i].columns % kind.block_elements:
                raise ValueError(
                    f"--keep {keep}: rows of {targets[i].name} have {targets[i].columns} "
                    f"elements, no multiple of the {kind.block_elements} of {kind.name}; choose a "
                    "type with smaller blocks, such as Q8_0, or F16"
                )
            result[i] = kind
    return result


def parse_keep(keep: str) -> tuple[re.Pattern[str], GGMLType]:
    """The two sides of REGEX=TYPE. Raises `ValueError` if one is malformed."""
    kinds = {preset.base.name: preset.base for preset in PRESETS.values()}
    text, separator, name = keep.rpartition("=")
    if not separator or name.upper() not in kinds:
        raise ValueError(
            f"--keep {keep}: expected REGEX=TYPE, such as 'attn_.*=Q8_0', with a type of "
            f"{', '.join(kinds)}"
        )
    try:
        return re.compile(text), kinds[name.upper()]
    except re.error as error:
        raise ValueError(f"--keep {keep}: {text!r} is no regular expression ({error})") from None

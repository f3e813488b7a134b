"""What a model's name says: who made it, of which family, size, tuning and version.

The rules are those of GGUF's naming convention as llama.cpp's converter applies them, so that both
write the same `general.*` keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_STORAGE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"((A|\d+x)?\d+([._]\d+)?[KMBT]\d?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_TUNING = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_KEEPS_CASE = re.compile(r"v\d+(\.\d+)*$|\d")
_MAGNITUDES = " KMBT"


@dataclass(frozen=True, slots=True)
class ModelName:
    """The parts of a name; None where it does not say."""

    full: str
    organization: str | None = None
    basename: str | None = None
    size_label: str | None = None
    finetune: str | None = None
    version: str | None = None


@dataclass(slots=True)
class _Part:
    text: str
    kind: str | None
    in_basename: bool = False


def parse_name(name: str, parameters: int) -> ModelName:
    """Take `organization/Family-7B-Chat-v1` apart; `parameters` is the model's true count.

    A size that is far from `parameters` is no size, rather a context length.
    """
    if " " in name:
        return ModelName(name)
    owner, slash, full = name.partition("/") if "/" in name else ("", "", name)
    parts = [
        _classify(text, index, parameters)
        for index, text in enumerate(filter(None, full.split("-")))
    ]
    _drop_worded_sizes(parts)
    _mark_basename(parts)
    sizes = dict.fromkeys(part.text for part in parts if part.kind == "size")
    found = {
        "size_label": "-".join(sizes) or None,
        "finetune": _join(part for part in parts if part.kind == "finetune"),
        "version": _join(p for p in parts if p.kind == "version" and not p.in_basename),
    }
    # A name without any of these is too ambiguous to call it a family.
    basename = _join(part for part in parts if part.in_basename) if any(found.values()) else None
    organization = owner if slash and not owner.startswith(".") else None
    return ModelName(full, organization, basename, **found)


def title(name: str) -> str:
    """A name as people write it: words apart, capitalized unless they are versions or acronyms."""
    words = name.replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not _KEEPS_CASE.match(word) else word for word in words
    )


def size_label(shared: int, per_expert: int, experts: int) -> str:
    """A label for a model without one in its name, such as 64x550M or 7.2B.

    `shared` and `per_expert` count parameters; `experts` is 0 for a dense model.
    """
    label = _rounded(shared + per_expert)
    return f"{experts}x{label}" if experts else label


def _join(parts: Iterable[_Part]) -> str | None:
    return "-".join(part.text for part in parts) or None


def _classify(text: str, index: int, parameters: int) -> _Part:
    if _VERSION.fullmatch(text):
        return _Part(text, "version")
    if _STORAGE.fullmatch(text):
        return _Part(text.upper(), "storage")
    if index and _SIZE.fullmatch(text):
        return _sized(text, parameters)
    return _Part(text, "finetune" if index and _TUNING.fullmatch(text) else None)


def _sized(text: str, parameters: int) -> _Part:
    text = text.replace("_", ".")
    if text[-1].isdecimal():  # 7b1 means 7.1B
        text = f"{text[:-2]}.{text[-1]}{text[-2]}"
    if text[-2].isdecimal():
        text = text[:-1] + text[-1].upper()
    try:
        stated = float(text[:-1]) * 1000 ** _MAGNITUDES.find(text[-1])
    except ValueError:  # a word, or a product such as 8x7B
        return _Part(text, "size")
    if parameters and abs(stated - parameters) > 7 * parameters // 8:
        return _Part(text[:-1] + text[-1].lower(), "finetune")
    return _Part(text, "size")


def _drop_worded_sizes(parts: list[_Part]) -> None:
    """Where a size is given as a number, `mini` and the like are names."""
    sizes = [part for part in parts if part.kind == "size"]
    if any(char.isdecimal() for part in sizes for char in part.text):
        for part in sizes:
            if part.text.isalpha():
                part.kind = None


def _mark_basename(parts: list[_Part]) -> None:
    """The family is what comes first: words and versions, but no version at its end."""
    at_start = True
    for part in parts:
        named = part.kind is None and part.text[0].isalpha()
        at_start = at_start and (named or part.kind == "version")
        part.in_basename = at_start
        if part.kind is None and not at_start:
            part.kind = "finetune"
    for part in reversed(parts):
        if not part.in_basename or part.kind != "version":
            return
        part.in_basename = False


def _rounded(count: int) -> str:
    """Two digits at least: 3.2B, 16B, 671B."""
    steps = ((1e12, 1e-12, "T"), (1e9, 1e-9, "B"), (1e6, 1e-6, "M"), (-1.0, 1e-3, "K"))
    scale, letter = next((scale, letter) for above, scale, letter in steps if count > above)
    scaled = count * scale  # not divided: labels depend on the last bit
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{letter}"

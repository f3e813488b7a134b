"""The variants of a model in a repository: which GGUF files belong together, and as what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PREFERRED = "Q4_K_M"

# Delimited by - . _ / as in X-Q4_K_M.gguf, Q8_0/X-Q8_0-00001-of-00002.gguf, x.ud-q2_k_xl.gguf.
_QUANT = re.compile(
    r"(?:^|[-._/])"
    r"((?:UD-)?(?:I?Q[1-9]_(?:0(?:_\d_\d)?|1|K(?:_(?:XXS|XS|S|M|L|XL))?|XXS|XS|S|M|NL|XL)"
    r"|TQ[12]_0|BF16|FP?16|FP?32|MXFP4(?:_MOE)?))"
    r"(?=[-._/]|$)",
    re.IGNORECASE,
)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
_NO_MODEL = ("mmproj", "imatrix")


class VariantError(ValueError):
    """A repository does not have the variant that was asked for."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The files of one model, a single one or all parts in order, by their names.

    `quant` is what the names say, such as "Q4_K_M", or else the name itself. `missing` is a part
    that is not there, None where all are.
    """

    quant: str
    files: tuple[str, ...]
    missing: str | None = None

    @property
    def stem(self) -> str:
        """The name without the number of the part and without ".gguf"."""
        return _split(self.files[0])[0]


def find_variants(names: Iterable[str]) -> list[Variant]:
    """The variants among the files `names`, in the order of their names."""
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name.lower()
        if base.endswith(".gguf") and not any(word in base for word in _NO_MODEL):
            stem, number, count = _split(name)
            groups.setdefault((stem, count), {})[number] = name
    return [_variant(stem, count, parts) for (stem, count), parts in groups.items()]


def choose(variants: Sequence[Variant], quant: str | None, where: str) -> Variant:
    """The variant that `quant` names; if None, Q4_K_M, or the only one there is.

    `where` is the place to name in a message. Raises `VariantError`.
    """
    if not variants:
        raise VariantError(f"{where}: there is no GGUF file; choose a repository that has some")
    if quant is None:
        found = variants if len(variants) == 1 else matching(variants, PREFERRED)
        problem = "several variants"
    else:
        found = matching(variants, quant)
        problem = f"no {quant!r}" if not found else f"several variants match {quant!r}"
    if len(found) != 1:
        listed = ", ".join(labels(found if quant and found else variants))
        raise VariantError(f"{where}: {problem}; add one of these after a colon: {listed}")
    if found[0].missing:
        raise VariantError(f"{where}: {found[0].missing} is not there; choose another variant")
    return found[0]


def matching(variants: Sequence[Variant], quant: str) -> list[Variant]:
    """Variants whose quant is `quant`, or else whose name has it between two of - . _ /."""
    wanted = quant.lower()
    exact = [v for v in variants if wanted in (v.quant.lower(), v.stem.lower())]
    return exact or [v for v in variants if wanted in _pieces(v.stem.lower())]


def labels(variants: Sequence[Variant]) -> list[str]:
    """What to call each of `variants`: its quant, or where others have the same, its name."""
    quants = [variant.quant.lower() for variant in variants]
    return [
        variant.quant if quants.count(variant.quant.lower()) == 1 else variant.stem
        for variant in variants
    ]


def _split(name: str) -> tuple[str, int, int]:
    """The stem of a file name, the number of the part and how many there are."""
    stem = name[: -len(".gguf")]
    part = _PART.fullmatch(stem)
    return (part["stem"], int(part["number"]), int(part["count"])) if part else (stem, 1, 1)


def _variant(stem: str, count: int, parts: dict[int, str]) -> Variant:
    said = [match[1] for match in _QUANT.finditer(stem)]
    quant = said[-1].upper() if said else PurePosixPath(stem).name
    absent = next((number for number in range(1, count + 1) if number not in parts), None)
    missing = None if absent is None else f"{stem}-{absent:05}-of-{count:05}.gguf"
    return Variant(quant, tuple(parts[number] for number in sorted(parts)), missing)


def _pieces(stem: str) -> set[str]:
    """All that stands between two delimiters."""
    ends = [-1, *(i for i, letter in enumerate(stem) if letter in "-._/"), len(stem)]
    return {stem[a + 1 : b] for i, a in enumerate(ends) for b in ends[i + 1 :]}

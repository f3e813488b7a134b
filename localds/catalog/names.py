"""What a person may call a model: NAME[:QUANT] of a known one, or owner/repository[:QUANT]."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from localds.catalog.known import REPOSITORY, known_models
from localds.catalog.variants import choose, find_variants, labels

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from localds.catalog.known import KnownModel, KnownQuant
    from localds.catalog.variants import Variant


class UnknownModelError(ValueError):
    """A text does not name a model, or names several."""


class UnknownQuantError(UnknownModelError):
    """A model is known, but not the quant."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A model that was named: the repository, the quant if one was given, the registry's entry.

    `known` is None for owner/repository; `quant` is spelled as it was given, or for a known model
    as the registry has it.
    """

    repository: str
    quant: str | None
    known: KnownModel | None

    def __str__(self) -> str:
        name = self.known.name if self.known else self.repository
        return f"{name}:{self.quant}" if self.quant else name

    @property
    def known_quant(self) -> KnownQuant | None:
        """The registry's entry for the quant, of the default one where none was given."""
        return self.known.quants[self.quant or self.known.default] if self.known else None

    def choose(self, names: Collection[str]) -> Variant:
        """The variant that is meant among the file `names`. Raises `VariantError`."""
        entry = self.known_quant
        if self.known is None or entry is None:
            return choose(find_variants(names), self.quant, self.repository)
        matched = find_variants(name for name in names if fnmatchcase(name, entry.files))
        if len(matched) != 1 or matched[0].missing:
            there = ", ".join(labels(find_variants(names))) or "no GGUF file"
            raise UnknownQuantError(
                f"{self}: {self.known.source} says that {self.repository} has {entry.files}, but "
                f"there is {there}; correct the entry, or localds pull {self.repository}:QUANT"
            )
        return matched[0]


def parse(text: str) -> Reference:
    """What `text` names. Raises `UnknownModelError`, or `RegistryError` for a broken registry."""
    name, _, quant = text.partition(":")
    models = known_models()
    known = {key.lower(): model for key, model in models.items()}.get(name.lower())
    if known:
        return Reference(known.repository, _spelled(known, quant) if quant else None, known)
    if REPOSITORY.fullmatch(name):
        return Reference(name, quant or None, None)
    raise UnknownModelError(f"{text}: no model has this name; {suggest(name, models)}")


def suggest(name: str, models: Iterable[str]) -> str:
    """What to do where `name` is none of the `models`."""
    near = get_close_matches(name.lower(), models, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}`localds list` shows the names, and owner/repository names any on the hub"


def _spelled(model: KnownModel, quant: str) -> str:
    for name in model.quants:
        if name.lower() == quant.lower():
            return name
    raise UnknownQuantError(
        f"{model.name}: no quant {quant!r} is known, only {', '.join(model.quants)}; for another "
        f"of the repository: localds pull {model.repository}:{quant}"
    )

"""The models that are installed: whole GGUF files in the hub library's cache, whoever put them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from localds.catalog.known import known_models
from localds.catalog.variants import find_variants, labels, matching
from localds.gguf import GGUFError, GGUFFile
from localds.hub.cache import repositories, snapshots
from localds.models import read_geometry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from localds.catalog.known import KnownModel
    from localds.catalog.names import Reference
    from localds.catalog.variants import Variant


@dataclass(frozen=True, slots=True)
class Installed:
    """A model whose files are all there.

    `label` is what to write after the colon, mostly the quant; `path` is the (first) file, `size`
    the bytes of all; `known` is the registry's entry, None where it has none.
    """

    repository: str
    variant: Variant
    label: str
    path: Path
    size: int
    known: KnownModel | None

    @property
    def name(self) -> str:
        """What commands take: the registry's name, or the repository; and the quant."""
        return f"{self.known.name if self.known else self.repository}:{self.label}"

    @property
    def title(self) -> str:
        """What a person calls it: "DeepSeek V2 Lite Chat (Q4_K_M)"."""
        name = self.known.title if self.known else self.repository
        return f"{name} ({self.label})"


def find_installed(reference: Reference | None = None) -> list[Installed]:
    """What is installed, by repository and name; with `reference`, only what it may mean."""
    models = known_models().values()
    found = [
        model
        for repository, folder in repositories()
        if reference is None or repository == reference.repository
        for model in _in_repository(repository, folder, models)
    ]
    return found if reference is None else _meant(found, reference)


def runs(path: Path) -> bool:
    """Whether the file at `path` is whole and of an architecture that localds runs.

    The hub's cache is shared with other programs, whose models may be of any kind.
    """
    try:
        with GGUFFile.open(path) as gguf:
            read_geometry(gguf)
    except (GGUFError, OSError):
        return False
    return True


def _in_repository(
    repository: str, folder: Path, models: Iterable[KnownModel]
) -> Iterator[Installed]:
    """The models in one repository's folder: of each file, what the newest snapshot has."""
    seen: dict[str, tuple[Path, Variant]] = {}
    for snapshot in snapshots(folder):
        for variant in find_variants(_gguf_files(snapshot)):
            if not variant.missing:
                seen.setdefault(variant.stem, (snapshot, variant))
    variants = [variant for _, variant in seen.values()]
    for (snapshot, variant), label in zip(seen.values(), labels(variants), strict=True):
        files = [snapshot / name for name in variant.files]
        size = sum(file.stat().st_size for file in files)
        entry = _entry(repository, variant, models)
        known, label = entry if entry else (None, label)
        yield Installed(repository, variant, label, files[0], size, known)


def _gguf_files(snapshot: Path) -> Iterator[str]:
    """The names of the files that are there, links to nothing left out."""
    for folder, _, names in os.walk(snapshot):
        for name in names:
            path = Path(folder, name)
            if name.endswith(".gguf") and path.is_file():
                yield path.relative_to(snapshot).as_posix()


def _entry(
    repository: str, variant: Variant, models: Iterable[KnownModel]
) -> tuple[KnownModel, str] | None:
    """The known model that a variant is, and the quant's name there."""
    for model in models:
        if model.repository == repository:
            for quant in model.quants.values():
                if all(fnmatchcase(file, quant.files) for file in variant.files):
                    return model, quant.name
    return None


def _meant(found: Sequence[Installed], reference: Reference) -> list[Installed]:
    """Those of one repository that `reference` may mean: of its quant, where it names one."""
    if reference.known:
        found = [m for m in found if m.known and m.known.name == reference.known.name]
    if reference.quant is None:
        return list(found)
    exact = [model for model in found if model.label.lower() == reference.quant.lower()]
    if exact or reference.known:
        return exact
    wanted = matching([model.variant for model in found], reference.quant)
    return [model for model in found if model.variant in wanted]

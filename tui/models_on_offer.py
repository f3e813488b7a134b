"""The models that a person can choose from: built in, installed, or known and to be downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from localds.catalog.installed import find_installed
from localds.catalog.known import FILE_NAME, RegistryError, known_models
from localds.catalog.resolve import DEMO, DEMO_TITLE
from localds.gguf import GGUFError, GGUFFile
from localds.hub.cache import shortage
from localds.models import read_geometry
from tui.model_fit import Fit, fit_by_size, fit_of_file
from tui.unfinished import find_unfinished, parts_by_repository

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from localds.catalog.installed import Installed
    from localds.catalog.known import KnownModel, KnownQuant
    from localds.catalog.variants import Variant
    from tui.model_fit import Conditions
    from tui.unfinished import Unfinished

State = Literal[
    "built-in", "file", "installed", "partly downloaded", "not installed", "other kind", "broken"
]

_GUIDE_NOTES = "A tiny model that comes with localds and answers questions about it."


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that can be loaded, downloaded, or only explained.

    `name` is what commands call it; `title` and `quant` what people do. `path` is its (first)
    file, None where it is not whole. `fit` holds the reason of a state "broken" (the file, or the
    user's list of models) or "other kind" (of model than localds runs). `context` is in tokens, 0
    where it is not known. `have` are the bytes that are here of `size_bytes`; `stray_bytes` are
    of unfinished downloads in its repository that may be of it. `room` says what to do where the
    disk has no room for the download. `variant` are its files in the cache.
    """

    name: str
    title: str
    quant: str
    size_bytes: int
    state: State
    path: Path | None
    fit: Fit
    context: int = 0
    license: str = ""
    notes: str = ""
    repository: str = ""
    parameters: str = ""
    have: int = 0
    stray_bytes: int = 0
    room: str | None = None
    variant: Variant | None = None

    @property
    def label(self) -> str:
        """Title and quant: "DeepSeek V2 Lite Chat (Q4_K_M)"."""
        return f"{self.title} ({self.quant})" if self.quant else self.title

    @property
    def can_load(self) -> bool:
        """Whether the file is here and of a kind that localds runs."""
        return self.state in ("built-in", "file", "installed")

    @property
    def can_download(self) -> bool:
        """Whether something of it is still on the hub only."""
        return self.state in ("partly downloaded", "not installed")

    @property
    def can_remove(self) -> bool:
        """Whether something of it lies in the cache."""
        return bool(self.repository and (self.path or self.have or self.stray_bytes))

    @property
    def name_or_path(self) -> str:
        """What `localds.load` takes."""
        return self.name if self.repository else str(self.path)

    def is_called(self, name_or_path: str) -> bool:
        """Whether `name_or_path` means this model."""
        if name_or_path == self.name:
            return True
        return self.path is not None and Path(name_or_path).absolute() == self.path.absolute()


def offers(conditions: Conditions) -> list[Offer]:
    """All models, with how each would run: the built-in one, installed ones, and what can be had.

    Opens every installed file, so it takes a while. A list of models with a mistake is itself an
    offer, in place of what it would have named. Raises `ValueError` for a `ram` that is no size,
    `OSError` where the cache cannot be read.
    """
    guide = [_guide(conditions)] if DEMO.is_file() else []
    try:
        known, installed = known_models(), find_installed()
    except RegistryError as error:
        return [*guide, _broken_list(error)]
    here = [_installed(model, conditions) for model in installed]
    present = {(model.known.name, model.label) for model in installed if model.known}
    there = list(_not_installed(known.values(), present, conditions))
    there.sort(key=lambda offer: offer.state != "partly downloaded")
    return [*guide, *here, *there]


def file_offer(path: Path, conditions: Conditions) -> Offer:
    """A GGUF file anywhere, as an offer. Raises `OSError` where it cannot be looked at."""
    facts = _read(path, conditions)
    return Offer(
        name=str(path),
        title=path.stem,
        quant="",
        size_bytes=path.stat().st_size,
        state=facts.problem or "file",
        path=path,
        fit=facts.fit,
        context=facts.context,
        license=facts.license,
    )


def _guide(conditions: Conditions) -> Offer:
    offer = file_offer(DEMO, conditions)
    state: State = "built-in" if offer.can_load else offer.state
    return replace(offer, name="guide", title=DEMO_TITLE, state=state, notes=_GUIDE_NOTES)


def _broken_list(error: RegistryError) -> Offer:
    """The user's list of models, which says what is wrong with it."""
    text = f"{error}; until then neither known nor installed models can be listed"
    return Offer(FILE_NAME, FILE_NAME, "", 0, "broken", None, Fit("cannot run", text))


def _installed(model: Installed, conditions: Conditions) -> Offer:
    facts, known = _read(model.path, conditions), model.known
    return Offer(
        name=model.name,
        title=known.title if known else model.repository,
        quant=model.label,
        size_bytes=model.size,
        state=facts.problem or "installed",
        path=model.path,
        fit=facts.fit,
        context=facts.context,
        license=(known.license if known else "") or facts.license,
        notes=known.notes if known else "",
        repository=model.repository,
        parameters=known.parameters if known else "",
        have=model.size,
        variant=model.variant,
    )


def _not_installed(
    known: Iterable[KnownModel], present: Container[tuple[str, str]], conditions: Conditions
) -> Iterator[Offer]:
    """The quants of known models that are not whole here."""
    wanted = [
        (model, quant)
        for model in known
        for quant in model.quants.values()
        if (model.name, quant.name) not in present
    ]
    begun = {(m.name, q.name): find_unfinished(f"{m.name}:{q.name}") for m, q in wanted}
    claimed = {part for download in begun.values() if download for part in download.parts}
    stray = {
        repository: sum(size for part, size in parts.items() if part not in claimed)
        for repository, parts in parts_by_repository().items()
    }
    for model, quant in wanted:
        download = begun[model.name, quant.name]
        offer = _known_offer(model, quant, download, conditions)
        yield replace(offer, stray_bytes=0 if download else stray.get(model.repository, 0))


def _known_offer(
    model: KnownModel, quant: KnownQuant, download: Unfinished | None, conditions: Conditions
) -> Offer:
    size = download.size if download else quant.size
    have = download.have if download else 0
    return Offer(
        name=f"{model.name}:{quant.name}",
        title=model.title,
        quant=quant.name,
        size_bytes=size,
        state="partly downloaded" if download else "not installed",
        path=None,
        fit=fit_by_size(size, conditions),
        context=model.context,
        license=model.license,
        notes=model.notes,
        repository=model.repository,
        parameters=model.parameters,
        have=have,
        room=shortage(size - have),
        variant=download.variant if download and download.whole else None,
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a file tells; `problem` is a state, None where it can be loaded."""

    fit: Fit
    problem: Literal["other kind", "broken"] | None = None
    context: int = 0
    license: str = ""


def _read(path: Path, conditions: Conditions) -> _Facts:
    problem: Literal["other kind", "broken"] = "broken"
    try:
        with GGUFFile.open(path) as gguf:
            problem = "other kind"
            geometry = read_geometry(gguf)
            fit = fit_of_file(gguf, geometry, conditions)
            return _Facts(fit, None, geometry.context_length, gguf.text("general.license", ""))
    except (GGUFError, OSError) as error:
        return _Facts(Fit("cannot run", str(error)), problem)

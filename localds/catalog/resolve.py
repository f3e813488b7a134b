"""From what a person calls a model to its file; and which one it is when none is named."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from localds.catalog.installed import Installed, find_installed, runs
from localds.catalog.known import NAME, REPOSITORY, SUGGESTION, known_models
from localds.catalog.names import Reference, UnknownModelError, UnknownQuantError, parse, suggest
from localds.catalog.variants import PREFERRED
from localds.settings import LastUsed, last_used, remember
from localds.units import format_size

DEMO = Path(__file__).parent.parent / "demo" / "guide.gguf"
"""The built-in model, which answers questions about localds."""

DEMO_TITLE = "the built-in guide to localds"


class How(StrEnum):
    """How a model was chosen."""

    FILE = "the file that was named"
    NAME = "the name"
    LAST = "used last"
    ONLY = "the only one installed"
    DEMO = "no model is installed"
    DEMO_AMONG_OTHERS = "several models are installed and none was used yet"


@dataclass(frozen=True, slots=True)
class Found:
    """A model file (of a split model, the first part), how it was chosen, and what to call it."""

    path: Path
    how: How
    title: str


class NotInstalledError(ValueError):
    """A model is known, but is not on this machine."""


def find_model(name: str | None = None) -> Found:
    """The file that `name` means: a path, NAME[:QUANT] or owner/repository[:QUANT].

    Without a name it is the model used last, or the only one installed, or the built-in one. What
    looks like a path is taken for one, whether or not there is such a file. Raises
    `UnknownModelError` for what is neither a file nor a name, `NotInstalledError` for a model that
    must be pulled first, `RegistryError` for a broken `models.toml`.
    """
    if name is None:
        return _default()
    path = Path(name)
    if path.exists() or _looks_like_path(name):
        is_demo = path.exists() and DEMO.exists() and path.samefile(DEMO)
        return Found(path, How.FILE, DEMO_TITLE if is_demo else path.stem)
    return _found(_by_name(name), How.NAME)


def _looks_like_path(name: str) -> bool:
    base = name.partition(":")[0]
    return name.lower().endswith(".gguf") or not (
        NAME.fullmatch(base) or REPOSITORY.fullmatch(base)
    )


def _by_name(name: str) -> Installed:
    try:
        reference = parse(name)
    except UnknownQuantError:
        raise
    except UnknownModelError:
        near = suggest(name.partition(":")[0], known_models())
        raise UnknownModelError(
            f"{name}: no such file, and no model has this name; {near}"
        ) from None
    installed = find_installed(reference)
    if not installed:
        raise NotInstalledError(_not_installed(name, reference))
    return pick(installed, reference)


def remember_choice(found: Found) -> None:
    """So that the next chat needs no name; the model in the box is not remembered unasked."""
    if found.how in (How.FILE, How.NAME, How.ONLY):
        remember(LastUsed(found.path.absolute(), found.title))


def pick(installed: list[Installed], reference: Reference) -> Installed:
    """The one among several quants that is meant: the default, or else the only one."""
    if len(installed) > 1 and reference.quant is None:
        default = reference.known.default if reference.known else PREFERRED
        installed = [model for model in installed if model.label == default] or installed
    if len(installed) > 1:
        raise UnknownModelError(
            f"{reference}: several variants are installed; name one: "
            f"{', '.join(model.name for model in installed)}"
        )
    return installed[0]


def _not_installed(name: str, reference: Reference) -> str:
    size = f" ({format_size(reference.known_quant.size)})" if reference.known_quant else ""
    neither = "no such file, and the model" if "/" in name else "the model"
    return f"{name}: {neither} is not installed; get it with `localds pull {reference}`{size}"


def _default() -> Found:
    last = last_used()
    if last is not None and last.path.is_file():
        return Found(last.path, How.LAST, last.title)
    installed = [model for model in find_installed() if runs(model.path)]
    if len(installed) == 1:
        return _found(installed[0], How.ONLY)
    if not DEMO.is_file():
        raise NotInstalledError(
            f"no model is installed; see `localds list`, then get one: `localds pull {SUGGESTION}`"
        )
    return Found(DEMO, How.DEMO_AMONG_OTHERS if installed else How.DEMO, DEMO_TITLE)


def _found(model: Installed, how: How) -> Found:
    return Found(model.path, how, model.title)

"""The models that localds knows by a short name: its own list and the user's."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from localds.settings import config_folder
from localds.units import parse_size

FILE_NAME = "models.toml"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SUGGESTION = "v2-lite-chat"
"""What somebody who has no model yet is pointed to."""

_KEYS: dict[str, type] = {
    "title": str,
    "repository": str,
    "parameters": str,
    "context": int,
    "license": str,
    "default": str,
    "notes": str,
    "quants": dict,
}
_REQUIRED = ("title", "repository", "quants")


class RegistryError(ValueError):
    """A file of models says something that cannot be right."""


@dataclass(frozen=True, slots=True)
class KnownQuant:
    """One quantization of a model: the pattern of its file names, and their bytes together."""

    name: str
    files: str
    size: int


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with a short name. `context` is in tokens, 0 where it is not known.

    `default` is one of `quants`; `source` is the file that describes the model.
    """

    name: str
    title: str
    repository: str
    parameters: str
    context: int
    license: str
    default: str
    notes: str
    quants: dict[str, KnownQuant]
    source: Path


def user_file() -> Path:
    """The user's own models, which replace those of the same name."""
    return config_folder() / FILE_NAME


def shipped_file() -> Path:
    """The list that comes with localds: in the package, of an editable install in the sources."""
    package = Path(__file__).parent.parent
    packaged = package / FILE_NAME
    return packaged if packaged.exists() else package.parent / FILE_NAME


def known_models() -> dict[str, KnownModel]:
    """All known models by name. Raises `RegistryError` for a file that has a mistake."""
    models = read_models(shipped_file())
    own = user_file()
    return models | read_models(own) if own.exists() else models


def read_models(path: Path) -> dict[str, KnownModel]:
    """The models that the file `path` describes. Raises `RegistryError`."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RegistryError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or remove it"
        ) from None
    except ValueError as error:
        raise RegistryError(
            f"{path}: this is not TOML: {error}; correct it, or remove it"
        ) from None
    return {name: _model(path, name, entry) for name, entry in entries.items()}


def _model(path: Path, name: str, entry: Any) -> KnownModel:
    where = f"{path}: [{name}]"
    if not NAME.fullmatch(name):
        raise RegistryError(f"{where}: a name has letters, digits and . _ - only; rename it")
    if not isinstance(entry, dict):
        raise RegistryError(f"{where}: this is no table; write [{name}] and its keys below it")
    _check_keys(where, entry)
    if not REPOSITORY.fullmatch(entry["repository"]):
        raise RegistryError(
            f"{where}: repository is {entry['repository']!r}; write it like owner/name"
        )
    quants = {key: _quant(path, name, key, value) for key, value in entry["quants"].items()}
    if not quants:
        raise RegistryError(f"{where}: quants is empty; name one with its files and size")
    default = entry.get("default", next(iter(quants)))
    if default not in quants:
        raise RegistryError(
            f"{where}: default is {default!r}; write one of its quants, {', '.join(quants)}"
        )
    return KnownModel(
        name=name,
        title=entry["title"],
        repository=entry["repository"],
        parameters=entry.get("parameters", ""),
        context=entry.get("context", 0),
        license=entry.get("license", ""),
        default=default,
        notes=entry.get("notes", ""),
        quants=quants,
        source=path,
    )


def _check_keys(where: str, entry: dict[str, Any]) -> None:
    for key, value in entry.items():
        kind = _KEYS.get(key)
        if kind is None:
            near = get_close_matches(key, _KEYS, 1)
            remedy = f"write {near[0]}" if near else f"the keys are {', '.join(_KEYS)}"
            raise RegistryError(f"{where}: {key} is not a key; {remedy}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RegistryError(f"{where}: {key} is {value!r}; write {_KINDS[kind]}")
    for key in _REQUIRED:
        if key not in entry:
            raise RegistryError(f"{where}: {key} is missing; add it")


_KINDS = {
    str: "a text in quotes",
    int: "a whole number",
    dict: 'a table, like Q4_K_M = { files = "...", size = "10 GB" }',
}


def _quant(path: Path, model: str, name: str, entry: Any) -> KnownQuant:
    where = f"{path}: [{model}.quants] {name}"
    if not isinstance(entry, dict) or set(entry) != {"files", "size"}:
        raise RegistryError(f'{where}: write {{ files = "MODEL-{name}.gguf", size = "10 GB" }}')
    files, size = entry["files"], entry["size"]
    if not isinstance(files, str) or not files.endswith(".gguf"):
        raise RegistryError(f"{where}: files is {files!r}; write a pattern that ends in .gguf")
    try:
        size = parse_size(size) if isinstance(size, str) else size
    except ValueError as error:
        raise RegistryError(f"{where}: {error}") from None
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise RegistryError(f'{where}: size is {size!r}; write bytes, or a size like "10.4 GB"')
    return KnownQuant(name, files, size)

"""Which files a data source means: a file, a folder, or a data set on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localds.catalog.known import REPOSITORY
from localds.finetune.data.errors import DataError
from localds.finetune.data.hub import fetch_data_set

if TYPE_CHECKING:
    from collections.abc import Iterable

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".md")

_SPLIT = re.compile(r"(?<![a-z])(valid|validation|val|eval|dev|test)(?![a-z])")
# What tools of data sets put beside the data, and what describes it.
_NOT_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|(readme|license|changelog)\.(md|txt)"
)


@dataclass(frozen=True, slots=True)
class Files:
    """Files to train on, to evaluate on, and those of a test split, which are left alone."""

    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()


def find_files(source: str | Path) -> Files:
    """The files of `source`: a path, or owner/name[:PATTERN] of a data set on the hub.

    In a folder or a data set, names with valid, validation, val, eval or dev are for evaluation,
    those with test are left alone. Raises `DataError`, and `HubError` for the hub.
    """
    path = Path(source)
    if path.is_dir():
        return _by_split(path, _data_files(path))
    if path.exists():
        return Files((_checked(path),))
    name, _, pattern = str(source).partition(":")
    if REPOSITORY.fullmatch(name) and not name.endswith((*JSON_SUFFIXES, *TEXT_SUFFIXES)):
        folder, names = fetch_data_set(name, pattern or None)
        return _by_split(folder, [folder / name for name in names])
    raise DataError(
        f"{source}: no such file or folder; a data set on the hub is written owner/name[:PATTERN]"
    )


def split_of(name: str) -> str:
    """The split that a file belongs to, by its name: "train", "valid" or "test"."""
    found = _SPLIT.findall(name.lower())
    if not found:
        return "train"
    return "test" if found[-1] == "test" else "valid"


def _by_split(folder: Path, paths: Iterable[Path]) -> Files:
    splits: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in paths:
        splits[split_of(path.relative_to(folder).as_posix())].append(path)
    if not splits["train"]:
        names = ", ".join(path.name for path in [*splits["valid"], *splits["test"]][:5])
        raise DataError(f"{folder}: no file to train on, only {names}; name one train.jsonl")
    return Files(*(tuple(splits[split]) for split in ("train", "valid", "test")))


def _data_files(folder: Path) -> list[Path]:
    there = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )
    found = [
        path
        for path in there
        if path.suffix.lower() in (*JSON_SUFFIXES, *TEXT_SUFFIXES)
        and not _NOT_DATA.fullmatch(path.name.lower())
    ]
    if not found:
        raise DataError(
            f"{folder}: no {', '.join((*JSON_SUFFIXES, *TEXT_SUFFIXES))} file is in it"
            + (f"; {_unreadable(there[0])}" if there else "")
        )
    return found


def _checked(path: Path) -> Path:
    if path.suffix.lower() not in (*JSON_SUFFIXES, *TEXT_SUFFIXES):
        raise DataError(_unreadable(path))
    return path


def _unreadable(path: Path) -> str:
    if path.suffix.lower() in (".parquet", ".csv", ".arrow"):
        return (
            f"{path}: {path.suffix} files are not read; write the table as JSON Lines first, with "
            'pandas for example: read_...(...).to_json("train.jsonl", orient="records", lines=True)'
        )
    return f"{path}: data is read from {', '.join((*JSON_SUFFIXES, *TEXT_SUFFIXES))} files"

"""Which downloads were begun and not finished, so that the list can tell how far each is.

The cache names what came of a file by its hash only. A note beside it, written when a download
begins, says which model the hashes belong to; offline, nothing else could.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.catalog.variants import Variant
from localds.hub.cache import PART_SUFFIX, repositories, repository_folder
from localds.settings import cache_folder, write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from localds.catalog.pull import Pull


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A download that was begun: bytes in all, those that are here, and the files.

    `parts` are the names of the cache's parts, of files that are not whole; `whole` tells whether
    some file is.
    """

    size: int
    have: int
    variant: Variant
    parts: frozenset[str]
    whole: bool


def note_download(name: str, pull: Pull) -> None:
    """Write down what belongs to the download of the model `name`.

    Where that cannot be written, the list does not tell how far the download is.
    """
    files = [[p.file.name, p.file.digest, p.file.size] for p in pull.pieces]
    listing = pull.listing
    told = {"repository": listing.repository, "commit": listing.commit, "files": files}
    with suppress(OSError):
        write_whole(_file(name), json.dumps(told | {"quant": pull.quant}))


def forget_download(name: str) -> None:
    """Remove the note on the model `name`."""
    with suppress(OSError):
        _file(name).unlink()


def find_unfinished(name: str) -> Unfinished | None:
    """How far the download of the model `name` is; None where nothing of it is here."""
    try:
        told = json.loads(_file(name).read_text(encoding="utf-8"))
        folder = repository_folder(told["repository"])
        snapshot = folder / "snapshots" / told["commit"]
        files = [(str(file), str(digest), int(size)) for file, digest, size in told["files"]]
        variant = Variant(str(told["quant"]), tuple(file for file, _, _ in files))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    blobs = folder / "blobs"
    whole = [
        size
        for file, digest, size in files
        if size in (_size(blobs / digest), _size(snapshot / file))
    ]
    parts = {digest + PART_SUFFIX: size for _, digest, size in files}
    begun = [have for part, size in parts.items() if 0 < (have := _size(blobs / part)) <= size]
    if not whole and not begun:
        return None
    have, size = sum(whole) + sum(begun), sum(size for _, _, size in files)
    return Unfinished(size, have, variant, frozenset(parts), bool(whole))


def parts_by_repository() -> dict[str, dict[str, int]]:
    """The bytes of all parts in the cache, by repository and name, whoever began them."""
    return {
        repository: {part.name: _size(part) for part in (folder / "blobs").glob(f"*{PART_SUFFIX}")}
        for repository, folder in repositories()
    }


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _file(name: str) -> Path:
    key = hashlib.sha256(name.encode()).hexdigest()[:32]
    return cache_folder() / "downloads" / f"{key}.json"

"""The hub library's cache of models: where things lie in it, and how much room there is.

Layout: models--OWNER--NAME/ holds blobs/HASH (the contents), snapshots/COMMIT/PATH (links to them)
and refs/BRANCH (the commit that a branch had).
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from localds.settings import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

PART_SUFFIX = ".localds-part"
"""Ends the name of a blob that is not whole yet."""

_PREFIX = "models--"


def cache_root() -> Path:
    """The folder of the cache, which HF_HOME and HF_HUB_CACHE move."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(repository: str) -> Path:
    """Where the cache keeps the model `repository` ("owner/name")."""
    return cache_root() / (_PREFIX + repository.replace("/", "--"))


def repositories() -> Iterator[tuple[str, Path]]:
    """The models in the cache, by name, with their folders."""
    with suppress(OSError):
        for folder in sorted(cache_root().iterdir()):
            if folder.name.startswith(_PREFIX):
                yield folder.name.removeprefix(_PREFIX).replace("--", "/"), folder


def snapshots(folder: Path) -> list[Path]:
    """The snapshots in a repository's `folder`: that of the branch main first, then the newest."""
    with suppress(OSError):
        found = list((folder / "snapshots").iterdir())
        main = read_ref(folder, "main")
        return sorted(found, key=lambda path: (path.name != main, -path.stat().st_mtime))
    return []


def read_ref(folder: Path, revision: str) -> str | None:
    """The commit that the branch `revision` had when it was downloaded."""
    with suppress(OSError, ValueError):
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    return None


def write_ref(folder: Path, revision: str, commit: str) -> None:
    """Note that the branch or tag `revision` is at `commit`."""
    if revision != commit and read_ref(folder, revision) != commit:
        write_whole(folder / "refs" / revision, commit)


def lock_file(repository: str, blob: str) -> Path:
    """The file that the hub library, too, locks while it writes a blob."""
    return cache_root() / ".locks" / repository_folder(repository).name / f"{blob}.lock"


def link(blob: Path, pointer: Path) -> None:
    """Make `pointer` a link to `blob`; where links are not possible, move the blob there."""
    target = os.path.relpath(blob, pointer.parent)
    if pointer.is_symlink() and os.readlink(pointer) == target:  # noqa: PTH115
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    new = pointer.with_name(f".{pointer.name}.{os.getpid()}.link")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(target)
    except OSError:  # such as a disk with exFAT
        blob.replace(pointer)
    else:
        new.replace(pointer)


def shortage(needed: int) -> str | None:
    """What to tell a person where the cache has no room for `needed` bytes, otherwise None."""
    root, free = cache_root(), free_room()
    if needed <= free:
        return None
    return (
        f"{needed / 1e9:.1f} GB are still to be downloaded, but {root} has room for "
        f"{free / 1e9:.1f} GB; free some, or set HF_HOME to a folder on a larger disk"
    )


def free_room() -> int:
    """Bytes that fit on the disk of the cache."""
    root = cache_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    return shutil.disk_usage(existing).free

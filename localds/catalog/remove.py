"""Removing a model from the hub library's cache, and nothing that something else needs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from huggingface_hub import scan_cache_dir
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from localds.hub import cache as hub_cache
from localds.hub import verified

if TYPE_CHECKING:
    from pathlib import Path

    from localds.catalog.variants import Variant


class RemoveError(ValueError):
    """A model cannot be removed."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What is going to be removed: the `files` of a model in all snapshots, and unfinished `parts`.

    `size` are the bytes that it frees.
    """

    repository: str
    files: tuple[Path, ...]
    parts: tuple[Path, ...]
    size: int
    strategy: Any


def plan_removal(repository: str, variant: Variant | None) -> Removal:
    """What belongs to `variant`; without one, only the unfinished downloads of the repository.

    Those have no names, so they go with any variant. What another program downloads now stays.
    """
    folder = hub_cache.repository_folder(repository)
    parts = tuple(part for part in _parts(folder) if _is_idle(repository, part))
    size = sum(part.stat().st_size for part in parts)
    if variant is None:
        return Removal(repository, (), parts, size, None)
    cache = scan_cache_dir(hub_cache.cache_root())
    wanted = [
        file
        for repo in cache.repos
        if repo.repo_type == "model" and repo.repo_id == repository
        for revision in repo.revisions
        for file in revision.files
        if file.file_path.relative_to(revision.snapshot_path).as_posix() in variant.files
    ]
    if not wanted:
        problem = next((str(w) for w in cache.warnings if folder.name in str(w)), "")
        raise RemoveError(
            f"{repository}: the hub library does not find its files{': ' if problem else ''}"
            f"{problem}; remove the folder {folder} yourself"
        )
    strategy = cache.delete_files(*wanted)
    files = tuple(file.file_path for file in wanted)
    return Removal(repository, files, parts, size + strategy.expected_freed_size, strategy)


def remove(removal: Removal) -> None:
    """Do it: links first, then what no other snapshot links to, then empty folders."""
    for part in removal.parts:
        part.unlink(missing_ok=True)
    if removal.strategy is not None:
        removal.strategy.execute()
        for blob in removal.strategy.blobs:
            verified.forget(blob.name)
    left = [path for path in removal.files if path.is_symlink() or path.exists()]
    if left:
        raise RemoveError(f"{left[0]}: cannot be removed; check whose file it is")
    _tidy(hub_cache.repository_folder(removal.repository))


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / "blobs").glob(f"*{hub_cache.PART_SUFFIX}"))


def _is_idle(repository: str, part: Path) -> bool:
    """Whether nobody is downloading the blob."""
    lock = hub_cache.lock_file(repository, part.name.removesuffix(hub_cache.PART_SUFFIX))
    try:
        with WeakFileLock(lock, timeout=0.1):
            return True
    except (Timeout, OSError):
        return False


def _tidy(folder: Path) -> None:
    """Remove folders that are empty now, and branches whose snapshot is gone."""
    for snapshot in hub_cache.snapshots(folder):
        for inner in sorted(snapshot.glob("**/"), reverse=True):
            with suppress(OSError):
                inner.rmdir()
    left = {snapshot.name for snapshot in hub_cache.snapshots(folder)}
    for ref in (folder / "refs").glob("**/*"):
        if ref.is_file() and ref.read_text(encoding="utf-8").strip() not in left:
            ref.unlink()
    for inner in (folder / "refs", folder / "snapshots", folder / "blobs", folder):
        with suppress(OSError):
            inner.rmdir()

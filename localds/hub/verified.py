"""Which blobs of the cache have been checked against their hash, so that each is read once.

A note is a small file in the cache of localds, named by the hash; it holds the size and the time of
change that the blob had.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from localds.settings import cache_folder, write_whole

if TYPE_CHECKING:
    from pathlib import Path


def is_verified(path: Path, digest: str) -> bool:
    """Whether the file `path` was found to have the hash `digest`, and has not changed since."""
    with suppress(OSError, ValueError):
        return _note(digest).read_text(encoding="utf-8") == _describe(path.stat())
    return False


def set_verified(path: Path, digest: str) -> None:
    """Note that the file `path` has the hash `digest`. Where it cannot be noted, it is not."""
    with suppress(OSError):
        write_whole(_note(digest), _describe(path.stat()))


def forget(digest: str) -> None:
    """Remove the note about a blob."""
    with suppress(OSError):
        _note(digest).unlink()


def _note(digest: str) -> Path:
    return cache_folder() / "verified" / digest


def _describe(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"

"""Rows of the latent cache on disk, so that a conversation is opened again without computing it.

A block's key is a hash over the key of the block before it and its own tokens; the first follows
from the model and the layout of its rows. So conversations share what they have in common, one that
grows adds blocks at its end, and a block is found only by the tokens that it was computed from. The
last block of a conversation may be a short one, which is never used again once there is a longer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from localds import __version__
from localds.memory.row_blocks import BLOCK, PARTIAL, RowBlock, discard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from localds.memory.latents import LatentCache

DEFAULT_CAP = 4 << 30

_READERS = 4
_ABANDONED_NS = 3600 * 10**9
_STEP_NS = 1000


class KeepError(OSError):
    """Rows could not be written; the conversation itself is not affected."""


class _File(NamedTuple):
    used_ns: int
    nbytes: int
    path: Path


class KeptRows:
    """The rows of one model in `folder`, beside those of others.

    All together take at most `cap_bytes`; those used least recently go first. Several processes may
    use a folder at once.
    """

    def __init__(self, folder: Path, fingerprint: str, cap_bytes: int | None = None) -> None:
        """The default cap is 4 GiB, but at most a tenth of what is free on the disk.

        Raises `ValueError` for a negative one.
        """
        if cap_bytes is not None and cap_bytes < 0:
            raise ValueError(f"cap_bytes is {cap_bytes}; it must be at least 0")
        self._root = folder
        self._fingerprint = fingerprint
        self.cap_bytes = _default_cap(folder) if cap_bytes is None else cap_bytes

    def restore(self, cache: LatentCache, ids: Sequence[int]) -> int:
        """Append to `cache` the rows of tokens `ids`, as far as they are kept and fit.

        The tokens that the cache already holds must be the first of `ids`; their rows stay as they
        are. Returns how many were appended. What is damaged counts as not kept, and is deleted.
        """
        before = cache.length
        found = list(self._find(cache, ids[: cache.capacity]))
        now = time.time_ns()
        with ThreadPoolExecutor(_READERS) as readers:
            try:
                reads = [
                    readers.submit(block.read, cache, max(before - block.start, 0))
                    for block in found
                ]
                for block, read in zip(found, reads, strict=True):
                    if not read.result():
                        break
                    cache.extend(block.stop - cache.length)
                    block.touch(_used(block, now))
            finally:
                readers.shutdown(cancel_futures=True)
        return cache.length - before

    def keep(self, cache: LatentCache, ids: Sequence[int]) -> int:
        """Write the rows of `ids`, the first tokens of `cache`, in so far as they are not there.

        What was kept before makes room, down to the cap; rows that do not fit in it at all are
        left out. Returns the bytes written. Raises `KeepError` where the disk is full or the folder
        cannot be written to.
        """
        if len(ids) > cache.length:
            raise ValueError(f"cannot keep {len(ids)} tokens of a cache that holds {cache.length}")
        now = time.time_ns()
        missing = []
        room = self.cap_bytes
        for block in self._blocks(cache, ids):
            room -= block.nbytes(cache)
            if room < 0:
                break
            if block.is_there(cache):
                block.touch(_used(block, now))
            else:
                missing.append(block)
        size = sum(block.nbytes(cache) for block in missing)
        if missing:
            self._shrink(self.cap_bytes - size)
            self._write(missing, cache, now)
        return size

    def trim(self) -> int:
        """Delete what was used least recently, down to the cap; returns the bytes deleted.

        What cannot be deleted stays.
        """
        return self._shrink(self.cap_bytes)

    def _write(self, blocks: Sequence[RowBlock], cache: LatentCache, now: int) -> None:
        try:
            # Rows tell what a conversation was about.
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            for block in blocks:
                block.write(cache, _used(block, now))
        except OSError as error:
            raise KeepError(
                f"keeping {len(blocks)} blocks of rows in {self._folder} failed: {error.strerror}; "
                "make room there or check the folder's permissions"
            ) from error

    def _shrink(self, limit: int) -> int:
        """Delete down to `limit` bytes."""
        files = sorted(self._files())
        before = total = sum(file.nbytes for file in files)
        abandoned = time.time_ns() - _ABANDONED_NS
        for file in files:
            # A file that another process is writing is not old.
            partial = file.path.name.startswith(PARTIAL)
            wanted = file.used_ns > abandoned if partial else total <= limit
            if not wanted and discard(file.path):
                total -= file.nbytes
        return before - total

    def _files(self) -> Iterator[_File]:
        """What is kept of all models. Files may go meanwhile."""
        for folder in _entries(self._root):
            for entry in _entries(folder.path):
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                yield _File(status.st_mtime_ns, status.st_size, Path(entry.path))

    @property
    def _folder(self) -> Path:
        return self._root / self._fingerprint[:16]

    def _find(self, cache: LatentCache, ids: Sequence[int]) -> Iterator[RowBlock]:
        """What is there of `ids` after what `cache` holds; only the last block may be short."""
        before = self._seed(cache)
        for block in self._blocks(cache, ids):
            if block.stop > cache.length:
                stops = range(block.stop, max(block.start, cache.length), -1)
                parts = (self._block(before, ids[block.start : n], block.start) for n in stops)
                longest = next((part for part in parts if part.is_there(cache)), None)
                if longest:
                    yield longest
                if longest != block:
                    return
            before = block.key

    def _blocks(self, cache: LatentCache, ids: Sequence[int]) -> Iterator[RowBlock]:
        """All blocks of `ids`."""
        key = self._seed(cache)
        for start in range(0, len(ids), BLOCK):
            block = self._block(key, ids[start : start + BLOCK], start)
            yield block
            key = block.key

    def _block(self, before: bytes, ids: Sequence[int], start: int) -> RowBlock:
        key = hashlib.sha256(before + np.asarray(ids, "<i4").tobytes()).digest()
        return RowBlock(self._folder / key.hex(), key, start, start + len(ids))

    def _seed(self, cache: LatentCache) -> bytes:
        # Another release may compute other rows. Another device does, which the layout tells.
        return hashlib.sha256(f"{__version__} {self._fingerprint} {cache.layout}".encode()).digest()


def _used(block: RowBlock, now: int) -> int:
    """The time of last use to note: without what comes before it a block is worth nothing."""
    return now - block.start // BLOCK * _STEP_NS


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _default_cap(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return min(DEFAULT_CAP, shutil.disk_usage(existing).free // 10)

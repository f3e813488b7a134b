"""A block on disk: the rows of consecutive tokens in all layers, and a checksum over them.

A file holds a magic, the block's key, the rows layer by layer, and their CRC-32.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    from io import FileIO

    from localds.memory.latents import LatentCache

BLOCK = 32
"""Tokens of a block, but for the last of a conversation. Where two part, up to 31 are computed."""

PARTIAL = "."
"""What the names of files that are being written begin with."""

_MAGIC = b"localds rows\0\0\0\1"
_CHECKSUM = Struct("<I")


class RowBlock(NamedTuple):
    """A block of a conversation: where it lies on disk, its key, and which tokens it holds."""

    path: Path
    key: bytes
    start: int
    stop: int

    def nbytes(self, cache: LatentCache) -> int:
        """Size of the file for the rows of `cache`."""
        rows = len(cache.layers) * (self.stop - self.start) * cache.row_bytes
        return len(_MAGIC) + len(self.key) + rows + _CHECKSUM.size

    def is_there(self, cache: LatentCache) -> bool:
        """Whether there is a file of the right size for the rows of `cache`.

        Anything else in its place is deleted.
        """
        try:
            size = self.path.lstat().st_size
        except OSError:
            return False
        if size == self.nbytes(cache):
            return True
        discard(self.path)
        return False

    def read(self, cache: LatentCache, held: int) -> bool:
        """Fill rows of `cache` except the block's first `held`, which stay as they are.

        Returns False for a file that is gone, unreadable or not what was written; it is deleted,
        and the rows are undefined.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                whole = self._fill(file, cache, held)
        except OSError:
            whole = False
        if not whole:
            discard(self.path)
        return whole

    def _fill(self, file: FileIO, cache: LatentCache, held: int) -> bool:
        if file.read(len(_MAGIC) + len(self.key)) != _MAGIC + self.key:
            return False
        checksum = 0
        skipped = memoryview(bytearray(held * cache.row_bytes))
        for rows in cache.rows(self.start + held, self.stop):
            for part in (skipped, rows):
                if file.readinto(part) != len(part):
                    return False
                checksum = crc32(part, checksum)
        # One byte more than the checksum has: nothing may follow it.
        return file.read(_CHECKSUM.size + 1) == _CHECKSUM.pack(checksum)

    def write(self, cache: LatentCache, used_ns: int) -> None:
        """Write the rows of `cache`, with `used_ns` as the time of last use.

        Whoever reads the file finds all of it or none, but after a power failure it may be torn,
        which the checksum tells: waiting for the disk would buy nothing. Raises `OSError`.
        """
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + self.key)
                checksum = 0
                for rows in cache.rows(self.start, self.stop):
                    file.write(rows)
                    checksum = crc32(rows, checksum)
                file.write(_CHECKSUM.pack(checksum))
            os.utime(name, ns=(used_ns, used_ns))
            Path(name).replace(self.path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink(missing_ok=True)
            raise

    def touch(self, used_ns: int) -> None:
        """Note the time of last use. Where the folder may only be read, it stays as it was."""
        with suppress(OSError):
            os.utime(self.path, ns=(used_ns, used_ns))


def discard(path: Path) -> bool:
    """Delete a file, or a folder that someone put in its place; returns whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)

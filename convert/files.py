"""Reading pieces of large files without mapping them, and without keeping them in memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from convert.config import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def read_bytes(
    file: Path, start: int, count: int, what: str, *, keep: bool = True
) -> NDArray[np.uint8]:
    """Read `count` bytes of a file from `start` on, as `what` holds them.

    Without `keep`, they leave the page cache at once. Any number of threads may read. Raises
    `CheckpointError` if the file has been cut short or removed, or cannot be read.
    """
    buffer = np.empty(count, np.uint8)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            done = 0
            while done < count:
                got = stream.readinto(buffer.data[done:])
                if not got:
                    raise CheckpointError(
                        f"{file}: {what} ends early; the file was cut short while it was being read"
                    )
                done += got
            if not keep and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), start, count, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read {what} ({error.strerror})") from None
    return buffer


def fits_in_memory(size: int) -> bool:
    """Whether `size` bytes may stay in the page cache: they take less than half of the memory."""
    return size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

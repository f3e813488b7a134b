"""The speeds that `localds doctor` measures, for what localds plans with."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from localds.memory.speeds import refresh_speeds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localds.memory.speeds import Speeds
    from localds.ops.mlx_device import Gpu

_PIECE = 4 << 20
_FILE_BYTES = 256 << 20
"""More than a disk's own cache holds."""
LEAST_FREE = 1 << 30


def measure(gpu: Gpu | None, folder: Path) -> Speeds:
    """Measure memory, CPU and GPU, and the disk by a file in `folder`, which is removed again.

    That of the disk is None where less than 1 GiB is free, or nothing may be written.
    """
    statistics = os.statvfs(folder)
    free = statistics.f_bavail * statistics.f_frsize
    if free < LEAST_FREE or not os.access(folder, os.W_OK):
        return refresh_speeds(gpu)
    with _sample(folder) as file:
        return refresh_speeds(gpu, [file])


@contextmanager
def _sample(folder: Path) -> Iterator[Path]:
    """A file of random bytes, whole on the disk."""
    # Not a temporary file of Python's: Ctrl-C while it is made would leave it behind.
    path = folder / f".localds-speed-{os.getpid()}"
    piece = os.urandom(_PIECE)  # which no disk compresses
    try:
        with path.open("wb") as file:
            for _ in range(_FILE_BYTES // _PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # what is still to be written would slow down the reading
        yield path
    finally:
        path.unlink(missing_ok=True)

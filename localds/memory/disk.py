"""How fast a model's file can be read from the disk it lies on."""

from __future__ import annotations

import mmap
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from localds import _native
from localds.memory.trunk import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SECONDS = 0.5
_PIECE = 4 << 20
_THREADS = 2


def measure_disk(paths: Sequence[Path]) -> float:
    """Bytes a second of reads of 4 MiB at random places, two at once, around the system's cache.

    Takes half a second. Raises `ReadError`, an `OSError`, where the disk fails.
    """
    files = [_native.DirectFile(str(path)) for path in paths]
    started = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as readers:
        counts = list(readers.map(lambda seed: _read(files, seed), range(_THREADS)))
    return sum(counts) / (time.perf_counter() - started)


def _read(files: Sequence[_native.DirectFile], seed: int) -> int:
    """Read until the time is over; returns bytes."""
    places = random.Random(seed)  # noqa: S311  not for secrets
    out = np.frombuffer(mmap.mmap(-1, _PIECE), np.uint8)
    end = time.perf_counter() + _SECONDS
    done = 0
    while time.perf_counter() < end:
        file = places.choices(files, [file.size for file in files])[0]
        last = max(file.size - _PIECE, 0) // PAGE
        file.read(places.randrange(last + 1) * PAGE, out)
        done += min(_PIECE, file.size)
    return done

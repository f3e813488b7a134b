"""How long it takes to keep and to restore a conversation's rows, against reading the same files.

usage: kept_rows.py [FOLDER] [--tokens 10000] [--layers 27] [--width 576] [--cache-type f16]

The rows are made up, by default 10,000 tokens of DeepSeek-V2-Lite. FOLDER, by default a new one
where temporary files lie, says which disk. "Cold" is with the files dropped from the system's
cache. Each figure is the median of `--rounds`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from localds.memory.kept_rows import KeptRows
from localds.memory.latents import LatentCache
from localds.memory.row_blocks import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

CAP = 64 << 30


def new_cache(arguments: argparse.Namespace) -> LatentCache:
    return LatentCache(arguments.layers, arguments.width, arguments.tokens, arguments.cache_type)


def filled_cache(arguments: argparse.Namespace) -> LatentCache:
    cache = new_cache(arguments)
    random = np.random.default_rng(1)
    for layer in cache.layers:
        layer.data[:] = random.integers(0, 256, layer.data.shape, np.uint8)
    cache.extend(arguments.tokens)
    return cache


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def drop_from_cache(folder: Path) -> None:
    for path in files_in(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path) -> None:
    buffer = bytearray(8 << 20)
    for path in files_in(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    tokens = list(range(arguments.tokens))
    cache = filled_cache(arguments)
    keeps, reads, restores = [], {True: [], False: []}, {True: [], False: []}
    for number in range(arguments.rounds):
        kept = KeptRows(folder / str(number), "0" * 64, CAP)
        keeps.append(seconds(lambda kept=kept: kept.keep(cache, tokens)))
        for cold in (True, False):
            if cold:
                drop_from_cache(folder)
            reads[cold].append(seconds(lambda n=number: read_plainly(folder / str(n))))
            if cold:
                drop_from_cache(folder)
            again = new_cache(arguments)
            restores[cold].append(seconds(lambda kept=kept, to=again: kept.restore(to, tokens)))
            check(cache, again)
    size = sum(path.stat().st_size for path in files_in(folder / "0"))
    print(f"{size / 1e6:.0f} MB in blocks of {BLOCK} tokens")
    print(f"keep           {statistics.median(keeps):.3f} s")
    for cold in (False, True):
        read, restore = statistics.median(reads[cold]), statistics.median(restores[cold])
        ratio = f"plain read {read:.3f} s, ratio {restore / read:.2f}"
        print(f"restore, {'cold' if cold else 'warm'}  {restore:.3f} s, {ratio}")


def check(cache: LatentCache, again: LatentCache) -> None:
    length = cache.length
    if again.length != length or cache.rows(0, length) != again.rows(0, length):
        raise SystemExit("what was restored differs from what was kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=10000)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--cache-type", default="f16")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments)


if __name__ == "__main__":
    main()

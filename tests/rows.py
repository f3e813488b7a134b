"""Made-up rows of a latent cache, each of which follows from its token, place and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from localds.memory.latents import LatentCache
from localds.memory.row_blocks import BLOCK, PARTIAL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

CAP = 1 << 30
CONVERSATION = [(7919 * i + 11) % 50021 for i in range(10 * BLOCK + 13)]


def empty(
    layers: int = 3, width: int = 32, capacity: int = 20 * BLOCK, cache_type: str = "f16"
) -> LatentCache:
    cache = LatentCache(layers, width, capacity, cache_type)
    for layer in cache.layers:
        layer.data[:] = 0
    return cache


def cache_of(ids: Sequence[int], layers: int = 3, width: int = 32) -> LatentCache:
    """A cache that holds the rows of `ids`."""
    cache = empty(layers, width)
    for number, layer in enumerate(cache.layers):
        layer.data[: len(ids)] = _rows(ids, number, cache.row_bytes)
    cache.extend(len(ids))
    return cache


def wrong_rows(cache: LatentCache, ids: Sequence[int], start: int = 0) -> list[tuple[int, int]]:
    """Layer and position of the cache's rows, from `start` on, that are not those of `ids`."""
    wrong = []
    for number, layer in enumerate(cache.layers):
        expected = _rows(ids[: cache.length], number, cache.row_bytes)
        differ = (layer.data[start : cache.length] != expected[start:]).any(axis=1)
        wrong += [(number, start + int(at)) for at in np.flatnonzero(differ)]
    return wrong


def whole(tokens: int) -> int:
    """`tokens` down to a whole block."""
    return tokens // BLOCK * BLOCK


def file_bytes(tokens: int, layers: int = 3, row_bytes: int = 64) -> int:
    """Size of the files of so many tokens: with each block a magic, a key and a checksum."""
    return -(-tokens // BLOCK) * (16 + 32 + 4) + tokens * layers * row_bytes


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def partial_files(folder: Path) -> list[Path]:
    return [path for path in files(folder) if path.name.startswith(PARTIAL)]


def _rows(ids: Sequence[int], layer: int, row_bytes: int) -> NDArray[np.uint8]:
    """uint8 [tokens, row_bytes]."""
    seeds = np.asarray(ids, np.int64) * 31 + np.arange(len(ids)) * 7 + layer * 1013 + 1
    return ((seeds[:, None] * np.arange(1, row_bytes + 1)) >> 3).astype(np.uint8)

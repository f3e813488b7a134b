"""Random numbers that are the same on every machine and with every version of numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

_STEP = 0x9E3779B97F4A7C15
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix(words: Words, *key: int) -> Words:
    """Scatter uint64 values by `key` (splitmix64); different ones stay different."""
    for part in (*key, 0):
        words = words + np.uint64((part + 1) * _STEP % 2**64)
        words = (words ^ (words >> np.uint64(30))) * _FIRST
        words = (words ^ (words >> np.uint64(27))) * _SECOND
        words = words ^ (words >> np.uint64(31))
    return words


def shuffled(count: int, *key: int) -> NDArray[np.intp]:
    """The numbers below `count` in an order that `key` determines."""
    return np.argsort(mix(np.arange(count, dtype=np.uint64), *key), kind="stable")

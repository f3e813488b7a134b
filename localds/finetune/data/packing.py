"""Putting examples of different lengths into rows of equal length."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Final

import numpy as np

from localds.finetune.data.mixing import shuffled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Indices = NDArray[np.intp]

Rows = list[list[int]]
"""The indices of the examples in each row."""

WINDOW: Final = 4096
"""Examples that are packed among each other: many, to fill rows well; not all, to stay random."""


def pack(sizes: NDArray[np.int64], length: int, *key: int) -> Rows:
    """Put examples of `sizes` [n] into rows of `length`; returns the indices in each row.

    Every example is in one row. They are shuffled by `key`; within windows of them, those longer
    than half a row are placed first, the longest before the others, then the rest as they come,
    each into the fullest row that has room for it (best fit). So rows mix what is short, where the
    longest first throughout would put examples of one kind together. The rows of a window come in
    random order. Raises `ValueError` for one that is too long.
    """
    _check_sizes(sizes, length)
    rows: Rows = []
    for number, window in enumerate(_windows(len(sizes), *key)):
        rank = np.where(2 * sizes[window] > length, -sizes[window], 0)
        order = window[np.argsort(rank, kind="stable")]
        packed = _fill(order.tolist(), sizes[order].tolist(), length)
        rows += [packed[i] for i in shuffled(len(packed), *key, number, 1)]
    return rows


def group(sizes: NDArray[np.int64], length: int, count: int, *key: int) -> list[Rows]:
    """Micro-batches of `count` rows with one example each, of similar length, in random order."""
    _check_sizes(sizes, length)
    groups: list[Rows] = []
    for number, window in enumerate(_windows(len(sizes), *key)):
        order = window[np.argsort(-sizes[window], kind="stable")].tolist()
        batches = [[[i] for i in order[at : at + count]] for at in range(0, len(order), count)]
        groups += [batches[i] for i in shuffled(len(batches), *key, number, 1)]
    return groups


def _windows(count: int, *key: int) -> Iterator[Indices]:
    order = shuffled(count, *key)
    return (order[at : at + WINDOW] for at in range(0, count, WINDOW))


def _fill(order: list[int], sizes: list[int], length: int) -> Rows:
    rows: Rows = []
    free: list[tuple[int, int]] = []  # room and number of each row, the fullest first
    for index, size in zip(order, sizes, strict=True):
        at = bisect_left(free, (size, 0))
        if at < len(free):
            room, row = free.pop(at)
            rows[row].append(index)
        else:
            room, row = length, len(rows)
            rows.append([index])
        if room > size:
            insort(free, (room - size, row))
    return rows


def _check_sizes(sizes: NDArray[np.int64], length: int) -> None:
    if len(sizes) and sizes.max() > length:
        raise ValueError(
            f"an example needs {sizes.max():,} positions and rows have {length:,}; cut the "
            "examples when they are encoded, or choose longer rows"
        )

"""Encoded examples: one of them, and very many of them in little memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int32]
    Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """`ids` int32 [n], and `trained` bool [n]: whether predicting ids[i] counts in the loss.

    Nothing predicts the first one, so trained[0] is False.
    """

    ids: Ints
    trained: Bools

    def __len__(self) -> int:
        return len(self.ids)


class Examples:
    """A sequence of `Encoded`, which share two arrays: five bytes a token."""

    def __init__(self, ids: Ints, trained: Bools, starts: Longs, ends: Longs) -> None:
        """Example i is ids[starts[i]:ends[i]]; `ids` int32 and `trained` bool are [tokens]."""
        self._ids, self._trained = ids, trained
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Encoded:
        start, end = self._starts[index], self._ends[index]
        return Encoded(self._ids[start:end], self._trained[start:end])

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> Longs:
        """Tokens of each example, int64 [n]."""
        return self._ends - self._starts

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss, of all examples."""
        before = np.concatenate([[0], np.cumsum(self._trained, dtype=np.int64)])
        return int((before[self._ends] - before[self._starts]).sum())

    def subset(self, indices: NDArray[np.intp]) -> Examples:
        """The examples with these indices, in this order; the arrays stay shared."""
        return Examples(self._ids, self._trained, self._starts[indices], self._ends[indices])


class ExamplesBuilder:
    """Collects encoded examples into `Examples`."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._trained = bytearray()
        self._bounds = array("q", [0])

    def add(self, example: Encoded) -> None:
        """Append one."""
        self._ids.frombytes(example.ids.tobytes())
        self._trained += example.trained.tobytes()
        self._bounds.append(len(self._ids))

    def build(self) -> Examples:
        """All that was added. The builder cannot be added to afterwards."""
        bounds = np.frombuffer(self._bounds, np.int64)
        ids = np.frombuffer(self._ids, np.int32)
        return Examples(ids, np.frombuffer(self._trained, np.bool_), bounds[:-1], bounds[1:])

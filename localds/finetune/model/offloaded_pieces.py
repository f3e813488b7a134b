"""How what goes to a layer's experts is divided among pieces of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from localds.finetune.model.matrices import mapped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.feed_forward import Gated
    from localds.ops.mlx.matrix import Matrix
    from localds.ops.mlx.slots import ExpertSlots
    from localds.ops.mlx.staging import HostExperts, Stager

    Ids = NDArray[np.int32]


class Piece(NamedTuple):
    """Some experts on the device, and the pairs of a row and an expert that are for them.

    `ids` int32 [p] are the experts in the stacks `gate`, `up` and `down`; `pairs` uint32 [r] are
    pairs, of `total`, and `local` uint32 [r], ascending, the places of their experts in the stacks.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    ids: Ids
    pairs: NDArray[np.uint32]
    total: int
    local: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The experts of a layer, up to `size` of them at a time: those in `slots`, then the others."""

    backend: Backend
    host: HostExperts
    slots: ExpertSlots
    stager: Stager
    size: int

    def of(self, experts: Ids) -> Iterator[Piece]:
        """The pieces for pairs with `experts` [m]. The next one is read meanwhile."""
        for start in range(0, len(self.slots.experts), self.size):
            here = slice(start, start + self.size)
            ids = np.array(self.slots.experts[here], np.int32)
            if np.isin(ids, experts).any():
                yield self._piece(_part(self.slots.gated, here), ids, experts)
        used = np.unique(experts)
        missing = used[self.slots.of[used] < 0].astype(np.int32)
        pieces = [missing[i : i + self.size] for i in range(0, len(missing), self.size)]
        for ids, parts in self.stager.read(self.host, pieces):
            yield self._piece(_matrices(self.host.load(self.backend, parts)), ids, experts)

    def all(self) -> Iterator[tuple[Matrix, Matrix, Matrix]]:
        """The stacks of all experts in order, from the host."""
        ids = np.arange(self.host.experts, dtype=np.int32)
        pieces = [ids[i : i + self.size] for i in range(0, len(ids), self.size)]
        for _, parts in self.stager.read(self.host, pieces):
            yield _matrices(self.host.load(self.backend, parts))

    def _piece(self, matrices: tuple[Matrix, Matrix, Matrix], ids: Ids, experts: Ids) -> Piece:
        index = np.full(self.host.experts, -1, np.int32)
        index[ids] = np.arange(len(ids))
        at = index[experts]
        mine = np.flatnonzero(at >= 0).astype(np.uint32)
        pairs = mine[np.argsort(at[mine], kind="stable")]
        return Piece(*matrices, ids, pairs, len(experts), at[pairs].astype(np.uint32))


class Filled:
    """An array that is filled part by part; what is never filled is 0."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.array = mx.zeros(shape)

    def put(self, rows: mx.array, values: mx.array) -> None:
        """Fill rows, in the memory that is there if nobody else keeps the array."""
        self.array[rows] = values

    def computed(self) -> mx.array:
        """The array, once it is there."""
        mx.eval(self.array)
        return self.array


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows with each of their experts, in the order of experts.

    `experts` int32 [m]; the row of each pair is in `rows`, and its number among the pairs before
    they were put into order in `numbers`, uint32 [m].
    """

    experts: Ids
    rows: NDArray[np.uint32]
    numbers: NDArray[np.uint32]

    @classmethod
    def of(cls, ids: mx.array) -> Pairs:
        """Those of ids [n, top_k]; waits for them."""
        flat = np.array(ids).astype(np.int32).reshape(-1)
        order = np.argsort(flat, kind="stable").astype(np.uint32)
        return cls(flat[order], order // ids.shape[1], order)

    @classmethod
    def ascending(cls, ids: mx.array) -> Pairs:
        """Each row once, with its expert in ids [m], which ascend."""
        experts = np.array(ids).astype(np.int32)
        numbers = np.arange(len(experts), dtype=np.uint32)
        return cls(experts, numbers, numbers)

    def at(self, pairs: NDArray[np.uint32]) -> tuple[mx.array, mx.array]:
        """The rows and the numbers of some."""
        return mx.array(self.rows[pairs]), mx.array(self.numbers[pairs])


def _part(gated: Gated | None, part: slice) -> tuple[Matrix, Matrix, Matrix]:
    assert gated is not None  # noqa: S101  there are slots
    gate, up, down = (mapped(matrix, lambda array: array[part]) for matrix in _matrices(gated))
    return gate, up, down


def _matrices(gated: Gated) -> tuple[Matrix, Matrix, Matrix]:
    assert gated.up is not None  # noqa: S101  `ApartExperts` has three
    return gated.gate, gated.up, gated.down

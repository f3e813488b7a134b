"""How much each routed expert works of late, and how a map of them is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALF_LIFE = 2
"""Uses of a layer, per expert that it has, after which a use counts half."""

LEVELS = 8
BRIGHTEST = 8.0
"""An expert with this many times the mean of its layer's uses is as bright as can be."""
GAMMA = 0.7
"""Below 1, so that the mean is not lost in the dark."""

NOTHING = 2 * LEVELS
"""The code of a cell without an expert. Others are a level, plus LEVELS where in memory."""
SELECTED = NOTHING + 1


class Heat:
    """Uses of late of each expert, out of totals that only grow."""

    def __init__(self) -> None:
        self._totals: NDArray[np.uint64] = np.zeros((0, 0), np.uint64)
        self._late: NDArray[np.float64] = np.zeros((0, 0))

    def update(self, totals: NDArray[np.uint64]) -> None:
        """Take in `totals` uint64 [layers, experts]; where they are less than before, begin anew.

        A use counts half after as many later ones in its layer as HALF_LIFE tells. Those between
        two updates are taken to be spread evenly, so that it does not matter how often one looks.
        """
        if totals.shape != self._totals.shape or (totals < self._totals).any():
            self._totals = np.zeros(totals.shape, np.uint64)
            self._late = np.zeros(totals.shape)
        new = (totals - self._totals).astype(np.float64)
        ages = new.sum(axis=1, keepdims=True) * (np.log(2) / (HALF_LIFE * totals.shape[1]))
        fresh = np.divide(-np.expm1(-ages), ages, out=np.ones_like(ages), where=ages > 0)
        self._late = self._late * np.exp(-ages) + new * fresh
        self._totals = totals.copy()

    def shares(self) -> NDArray[np.float64]:
        """Parts of their layer's uses of late, float64 [layers, experts]; 0 in unused layers."""
        sums = self._late.sum(axis=1, keepdims=True)
        shares: NDArray[np.float64] = np.zeros_like(self._late)
        np.divide(self._late, sums, out=shares, where=sums > 0)
        return shares


@dataclass(frozen=True, slots=True)
class Grid:
    """How experts are laid out: as many in each column as in any other, to one, so that they fit.

    The numbers of layers take the first `label` cells of a line; a column is `stretch` cells wide.
    """

    label: int
    experts: int
    columns: int
    stretch: int

    @classmethod
    def of(cls, layers: tuple[int, ...], experts: int, width: int) -> Grid:
        """The grid for these layers and experts in `width` cells."""
        label = len(str(max(layers))) + 1
        room = max(width - label, 1)
        # Columns of one expert beside columns of two would look like stripes; 3 and 4 do not.
        columns = room if experts >= 3 * room else -(-experts // -(-experts // room))
        return cls(label, experts, columns, room // columns)

    @property
    def width(self) -> int:
        """Cells of a line that are used."""
        return self.label + self.columns * self.stretch

    def first(self, column: int) -> int:
        """The first expert of a column."""
        return column * self.experts // self.columns

    def codes(self, shares: NDArray[np.float64], resident: NDArray[np.bool_]) -> NDArray[np.uint16]:
        """Codes [layers, columns]: each that of its hottest expert, one in memory going first."""
        heat = (shares * (self.experts / BRIGHTEST)) ** GAMMA
        levels = np.minimum((heat * LEVELS).astype(np.uint16), LEVELS - 1)
        firsts = [self.first(column) for column in range(self.columns)]
        # With the residence as its last bit a rank sorts by heat first.
        ranks = np.maximum.reduceat(2 * levels + resident, firsts, axis=1)
        codes: NDArray[np.uint16] = (ranks // 2 + LEVELS * (ranks % 2)).astype(np.uint16)
        return codes

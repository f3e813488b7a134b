"""Which experts of a layer deserve the places nearest to where they are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HALF_LIFE = 1024
"""Tokens after which a use counts half: about a long question and its answer."""

# Moving an expert costs as much as computing it some dozen times where it lies.
_MARGIN = 8.0


class HotSet:
    """The uses of late of one layer's experts; older ones count less.

    It depends on nothing but what it was told, so that a run can be repeated.
    """

    def __init__(self, experts: int, uses: NDArray[np.uint32] | None = None) -> None:
        """`uses` uint32 [experts] were counted in earlier runs."""
        self.scores = np.zeros(experts) if uses is None else uses.astype(np.float64)

    def add(self, ids: NDArray[np.integer[Any]]) -> None:
        """Count the experts `ids` [n_tokens, top_k] of one pass."""
        self.scores *= 0.5 ** (len(ids) / HALF_LIFE)
        self.scores += np.bincount(ids.reshape(-1), minlength=len(self.scores))

    def best(self, count: int) -> NDArray[np.int32]:
        """The `count` experts with the highest scores, ascending; of equal ones the first."""
        order = np.argsort(-self.scores, kind="stable")
        return np.sort(order[:count]).astype(np.int32)

    def least(self, resident: Sequence[int], spared: NDArray[np.bool_]) -> list[int]:
        """Slots of the experts `resident`, the least used first, without those `spared`."""
        slots = [slot for slot, expert in enumerate(resident) if not spared[expert]]
        return sorted(slots, key=lambda slot: (self.scores[resident[slot]], slot))

    def swaps(self, resident: Sequence[int], most: int) -> list[tuple[int, int]]:
        """Up to `most` slots of `resident`, each with an expert that is used so much more."""
        inside = np.zeros(len(self.scores), np.bool_)
        inside[list(resident)] = True
        newcomers = [e for e in np.argsort(-self.scores, kind="stable").tolist() if not inside[e]]
        leaving = self.least(resident, ~inside)
        return [
            (slot, expert)
            for slot, expert in zip(leaving[:most], newcomers, strict=False)
            if self.scores[expert] > self.scores[resident[slot]] + _MARGIN
        ]

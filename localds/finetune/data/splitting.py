"""Keeping a part of the examples for evaluation, so that it shares nothing with training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from localds.finetune.data.mixing import mix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]


def held_out(digests: Words, share: float, seed: int) -> NDArray[np.bool_]:
    """Choose examples for evaluation: `share` of them or less, at least one; bool [n].

    Examples with the same digest (uint64 [n]) go together; only where there is no smaller choice
    are they more than the share. The choice does not depend on their order. None are chosen where
    `share` is 0, or all are the same.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"the share for evaluation is {share}; it must be from 0 to 0.5")
    kinds, which, counts = np.unique(digests, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(kinds), np.bool_)
    if share > 0 and len(kinds) > 1:
        order = np.argsort(mix(kinds, seed), kind="stable")
        chosen[_fill(order, counts, max(1, round(share * len(digests))))] = True
    result: NDArray[np.bool_] = chosen[which]
    return result


def _fill(order: NDArray[np.intp], counts: NDArray[np.intp], room: int) -> list[int]:
    """The kinds that come first in `order` and fit into `room` together; else the rarest."""
    taken = []
    for kind in order.tolist():
        if counts[kind] <= room:
            taken.append(kind)
            room -= int(counts[kind])
        if not room:
            break
    return taken or [min(order.tolist(), key=counts.__getitem__)]

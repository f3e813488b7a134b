"""The experts of a layer that lie on the device, where not all of them fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.feed_forward import Gated
    from localds.ops.mlx.staging import HostExperts

READ_AT_ONCE = 16
"""Experts that are read together when slots are filled."""


class ExpertSlots:
    """Stacks with room for some experts of `host`.

    `of` int32 [experts] is each expert's slot, -1 where it lies elsewhere; `experts` are those in
    the slots. `gated` is the stack, None for no slots.
    """

    def __init__(self, backend: Backend, host: HostExperts, ids: NDArray[np.int32]) -> None:
        """Slots that hold the experts `ids`, ascending."""
        self._backend = backend
        self._host = host
        self.experts: list[int] = ids.tolist()
        self.of = np.full(host.experts, -1, np.int32)
        self.of[ids] = np.arange(len(ids))
        self.gated: Gated | None = None
        if len(ids):
            self.gated = host.load(backend, host.read(ids))

    @property
    def elsewhere(self) -> NDArray[np.uint8]:
        """1 for each expert that lies in a slot, uint8 [experts]: elsewhere, for the host."""
        return (self.of >= 0).astype(np.uint8)

    def swap(self, changes: Sequence[tuple[int, int]]) -> None:
        """Put experts into slots in place of others: pairs of a slot and an expert."""
        changes = sorted(changes, key=lambda change: change[1])
        for start in range(0, len(changes), READ_AT_ONCE):
            self._swap(changes[start : start + READ_AT_ONCE])

    def _swap(self, changes: Sequence[tuple[int, int]]) -> None:
        assert self.gated is not None  # noqa: S101  there are no slots to name otherwise
        parts = self._host.read(np.array([expert for _, expert in changes], np.int32))
        for index, (slot, expert) in enumerate(changes):
            one = self._host.load(self._backend, [part[index] for part in parts])
            # Nobody else may hold the stack, so that its memory is used again.
            self.gated = self.gated.put(slot, one)
            mx.eval(*self.gated.arrays())
            self.of[self.experts[slot]] = -1
            self.of[expert] = slot
            self.experts[slot] = expert

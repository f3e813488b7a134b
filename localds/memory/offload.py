"""A model that is larger than its memory, at run time: its experts' store, and who watches it."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

from localds.memory.experts import ExpertStore
from localds.memory.machine import available_memory, reserve
from localds.memory.pressure import Limits, PressureWatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from localds.gguf import GGUFFile
    from localds.memory.placement import Placement
    from localds.models.geometry import Geometry


class Offload:
    """The store, and a thread that takes memory from it when others need it, and gives it back.

    `close()` ends the thread. The pool goes with the last layer that uses it.
    """

    def __init__(self, gguf: GGUFFile, geometry: Geometry, placement: Placement) -> None:
        self.store = ExpertStore(gguf, geometry, placement)
        self._placement = placement
        self._usage: NDArray[np.uint32] | None = None
        self._watch = PressureWatch(
            Limits(placement.slot_bytes, placement.least_slots, reserve() // 2),
            placement.slots,
            room=available_memory,
            resize=self.store.native.resize,
        )
        # Also when nobody closes the model: a thread that goes on would keep the store.
        self.close = weakref.finalize(self, self._watch.stop)

    def start(self, usage: NDArray[np.uint32] | None) -> None:
        """Fill the pool in the background, by the uses counted in earlier runs."""
        self._usage = usage
        self.store.warm(usage)
        self._watch.start()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Leave most of the pool's memory to somebody else for a while, and fill it again after."""
        self._watch.set_wanted(self._placement.least_slots)
        try:
            yield
        finally:
            self._watch.set_wanted(self._placement.slots)
            self.store.warm(self._usage)
            self.store.wait_warm()

    def resize(self, placement: Placement) -> None:
        """Follow a new placement."""
        self._placement = placement
        self._watch.set_wanted(placement.slots)

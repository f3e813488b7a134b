"""The experts of all layers of a model: which of them lie on the device, and where the others."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from localds.finetune.model.matrices import row_squares
from localds.finetune.model.offloaded import OffloadedExperts, Untraced
from localds.finetune.model.offloaded_adapters import StackAdapters
from localds.finetune.model.offloaded_host import host_of, staged_bytes
from localds.finetune.model.offloaded_pieces import Pieces
from localds.ops.mlx.slots import ExpertSlots
from localds.ops.mlx.staging import Stager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localds.finetune.model.adapter import Adapter
    from localds.finetune.model.offloaded_adapters import NewAdapter
    from localds.memory.experts import ExpertStore
    from localds.models.geometry import Geometry
    from localds.ops import MoeWeights, Router
    from localds.ops.mlx.backend import Backend


def offloaded_experts(
    geometry: Geometry,
    backend: Backend,
    *,
    slots: Sequence[int],
    staging_bytes: int,
    store: ExpertStore | None = None,
) -> OffloadedLayers:
    """As `OffloadedLayers`, for the model of `geometry`; raises `ValueError` if slots don't fit."""
    if len(slots) != geometry.moe_layers or min(slots, default=0) < 0:
        raise ValueError(
            f"slots are {list(slots)}; give a number from 0 to {geometry.experts} for each of the "
            f"{geometry.moe_layers} layers with experts"
        )
    return OffloadedLayers(backend, slots=slots, staging_bytes=staging_bytes, store=store)


class OffloadedLayers:
    """Makes the experts of layers, which ask in order; a `Split` for `TrainModel`.

    `slots` says for each layer with experts how many of them lie on the device; `layers` are those
    of which not all do. The others come there through `staging_bytes` of its memory, from the
    file's map, or with a `store`, from there. Raises `ValueError` if an expert has no room there.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        slots: Sequence[int],
        staging_bytes: int,
        store: ExpertStore | None = None,
    ) -> None:
        self.layers: list[OffloadedExperts] = []
        self._backend = backend
        self._slots = iter(slots)
        self._staging_bytes = staging_bytes
        self._store = store
        self._stager = Stager()
        self._untraced = Untraced()

    def __call__(
        self, weights: MoeWeights, router: Router, new_adapter: NewAdapter = lambda *_: None
    ) -> OffloadedExperts | None:
        """The experts of the next layer; None if all of them are to lie on the device."""
        count = next(self._slots)
        if count >= router.n_experts:
            return None
        host = host_of(weights, router.n_experts, self._store)
        one = staged_bytes(host, self._backend)
        if self._staging_bytes < one:
            raise ValueError(
                f"staging_bytes is {self._staging_bytes}; an expert needs {one}: give more VRAM"
            )
        pieces = Pieces(
            backend=self._backend,
            host=host,
            slots=ExpertSlots(self._backend, host, np.arange(count, dtype=np.int32)),
            stager=self._stager,
            size=self._staging_bytes // one,
        )
        layer = OffloadedExperts(pieces, _adapters(weights, pieces, new_adapter), self._untraced)
        self.layers.append(layer)
        return layer

    def reselect(self) -> None:
        """Give slots to the experts that were used most so far; between steps."""
        for layer in self.layers:
            layer.reselect()

    def close(self) -> None:
        """End the threads."""
        self._stager.close()
        self._untraced.close()


def _adapters(weights: MoeWeights, pieces: Pieces, new_adapter: NewAdapter) -> StackAdapters:
    block = weights.down.name.removesuffix("ffn_down_exps.weight")
    width, hidden, experts = weights.down.shape

    @cache
    def squares() -> tuple[mx.array, ...]:
        parts = [[row_squares(matrix) for matrix in matrices] for matrices in pieces.all()]
        return tuple(mx.concatenate(list(of_one)) for of_one in zip(*parts, strict=True))

    def adapter(number: int, name: str, rows: int, columns: int) -> Adapter | None:
        shape = experts, rows, columns
        return new_adapter(f"{block}ffn_{name}_exps", shape, lambda: squares()[number])

    return StackAdapters(
        gate=adapter(0, "gate", width, hidden),
        up=adapter(1, "up", width, hidden),
        down=adapter(2, "down", hidden, width),
    )

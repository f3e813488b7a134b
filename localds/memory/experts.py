"""The expert store: routed experts on demand from the file, into a bounded pool of memory.

The store itself is native (native/experts/); here it is described to it where the experts of a file
lie, and what it does is told.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from localds import _native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from localds.gguf import GGUFFile, Tensor
    from localds.memory.placement import Placement
    from localds.models.geometry import Geometry
    from localds.ops import MoeWeights

READERS = 4
"""Reads in flight: enough for the full speed of a disk, and those of an expert's parts at once."""

Part = tuple[int, int, int]
"""File, offset of the first expert, bytes of each expert."""


class ExpertStore:
    """The routed experts of one model. Layers join it in order, with `attach`.

    `expert_bytes` are the bytes of one expert in the file, for each layer.
    """

    def __init__(self, gguf: GGUFFile, geometry: Geometry, placement: Placement) -> None:
        paths = sorted({tensor.path for tensor in gguf.tensors.values()})
        files = {path: number for number, path in enumerate(paths)}
        self._layers: dict[str, int] = {}
        layers: list[tuple[int, list[Part]]] = []
        for block in range(geometry.layers):
            tensors = _routed(gguf, block)
            if tensors:
                self._layers[tensors[-1].name] = len(layers)
                layers.append((block, [_part(t, files[t.path], geometry.experts) for t in tensors]))
        self._part_bytes = [[nbytes for _, _, nbytes in parts] for _, parts in layers]
        self.expert_bytes = [sum(sizes) for sizes in self._part_bytes]
        self.experts = geometry.experts
        self.layers = len(layers)
        self.native = _native.ExpertStore(
            files=[str(path) for path in paths],
            layers=layers,
            experts=geometry.experts,
            slots=placement.slots,
            window=placement.window,
            ahead=placement.ahead,
            most=placement.most_slots,
            readers=READERS,
        )
        self._last: _native.MoeLayer | None = None

    def attach(self, layer: _native.MoeLayer, weights: MoeWeights) -> None:
        """Have a layer take its experts from here, and the one before look ahead to it."""
        number = self.number(weights)
        layer.read_from(self.native, number, fused=weights.gate_up is not None)
        if number > 0 and self._last is not None:
            self._last.look_ahead_to(layer)
        self._last = layer

    def number(self, weights: MoeWeights) -> int:
        """The number that a layer has here; they count from 0 in the model's order."""
        return self._layers[weights.down.name]

    def fetch(
        self,
        number: int,
        experts: NDArray[np.int32],
        tokens: NDArray[np.int64] | int = 1,
    ) -> list[NDArray[np.uint8]]:
        """Copies of some of a layer's experts, as they lie in the file.

        `experts` are ascending ids [m]; `tokens`, for each or for all, is how many want it. Returns
        arrays [m, bytes of a part], in the order gate_up, down or gate, up, down. Of a layer, parts
        that are fetched one after another should ascend, and come after what the CPU computes.
        Raises `ReadError`, and ValueError for ids that are no experts' or do not ascend.
        """
        outs = [np.empty((len(experts), size), np.uint8) for size in self._part_bytes[number]]
        self.native.fetch(number, experts, outs, tokens)
        return outs

    def warm(self, counts: NDArray[np.uint32] | None = None) -> None:
        """Fill the pool in the background with the experts that were used most.

        `counts` uint32 [layers, experts] are uses in earlier runs; without them all experts are
        alike, and layers get equal shares.
        """
        if counts is None:
            order = np.arange(self.layers * self.experts).reshape(self.layers, -1).T.ravel()
        else:
            self.native.restore(np.ascontiguousarray(counts, np.uint32).ravel())
            order = np.argsort(-counts.ravel().astype(np.int64), kind="stable")
        self.native.warm(np.ascontiguousarray(order, np.int32))

    def wait_warm(self) -> None:
        """Return when the pool is filled; Ctrl-C works meanwhile."""
        while not self.native.is_warm():
            time.sleep(0.02)

    def counts(self) -> NDArray[np.uint32]:
        """Uses of late, uint32 [layers, experts]; older ones count less."""
        return self.native.counts().reshape(self.layers, self.experts)

    def resident(self) -> NDArray[np.bool_]:
        """Which experts lie in memory now, bool [layers, experts]."""
        return self.native.resident().view(np.bool_).reshape(self.layers, self.experts)

    def figures(self) -> _native.StoreStats:
        """What was done since the store was made; `take_figures` changes nothing about it."""
        return self.native.stats()

    def take_figures(self) -> _native.StoreStats:
        """What was done since the last call of this method."""
        return self.native.take_stats()


def _routed(gguf: GGUFFile, block: int) -> Sequence[Tensor]:
    """A block's stacked experts, `down` last."""
    names = [f"blk.{block}.ffn_{name}_exps.weight" for name in ("gate_up", "gate", "up", "down")]
    return [gguf.tensors[name] for name in names if name in gguf.tensors]


def _part(tensor: Tensor, file: int, experts: int) -> Part:
    return file, tensor.offset, tensor.nbytes // experts

"""How a model's routed experts are divided between device and host, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localds.memory.hot_set import HotSet
from localds.ops.mlx.slots import ExpertSlots
from localds.ops.mlx.split import SplitMoe, Staging
from localds.ops.mlx.staging import HostExperts, Stager

if TYPE_CHECKING:
    from collections.abc import Sequence

    import mlx.core as mx
    import numpy as np
    from numpy.typing import NDArray

    from localds.gguf import Tensor
    from localds.memory.experts import ExpertStore
    from localds.ops import MoeWeights
    from localds.ops.cpu import CpuMoe, CpuOps
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.feed_forward import Choose, Gated


@dataclass(slots=True)
class Split:
    """What the layers of one model need to divide their experts. They ask for it in order.

    `slots` says for each layer with experts how many of them lie on the device. Those of the host
    lie in the file's map, or with a `store`, there; `cpu` prepares the layers that compute them.
    Experts come to the device through `staging_bytes` of its memory, for prompts of `stream_from`
    tokens at once and more (None: never); with `adopt`, for single tokens as well. `usage` uint32
    [layers, experts] are uses in earlier runs. `layers` are those that were divided, by their
    number among those with experts.
    """

    backend: Backend
    slots: Sequence[int]
    cpu: CpuOps
    staging_bytes: int
    stream_from: int | None
    adopt: bool
    store: ExpertStore | None = None
    usage: NDArray[np.uint32] | None = None
    stager: Stager = field(default_factory=Stager, init=False)
    layers: dict[int, SplitMoe] = field(default_factory=dict, init=False)
    _layer: int = field(default=-1, init=False)

    def next_slots(self) -> int:
        """How many experts of the next layer lie on the device."""
        self._layer += 1
        return self.slots[self._layer]

    def host(self, tensors: tuple[Tensor, ...], experts: int, weights: MoeWeights) -> HostExperts:
        """Where the experts of a layer lie, stacked in `tensors`."""
        if self.store is None:
            return HostExperts(tensors, experts)
        return HostExperts(tensors, experts, self.store, self.store.number(weights))

    def layer(
        self,
        *,
        norm: mx.array,
        eps: float,
        choose: Choose,
        shared: Gated | None,
        host: HostExperts,
        rest: CpuMoe,
    ) -> SplitMoe:
        """Put the layer together that `next_slots` was asked for."""
        usage = None if self.usage is None else self.usage[self._layer]
        hot = HotSet(host.experts, usage)
        slots = ExpertSlots(self.backend, host, hot.best(self.slots[self._layer]))
        layer = SplitMoe(
            norm=norm,
            eps=eps,
            choose=choose,
            shared=shared,
            slots=slots,
            host=host,
            rest=rest,
            staging=Staging(
                backend=self.backend,
                stager=self.stager,
                piece=max(self.staging_bytes // 2 // self._expert_bytes(host), 1),
                stream_from=float("inf") if self.stream_from is None else self.stream_from,
                adopt=self.adopt,
            ),
            hot=hot,
        )
        if self.layers:
            next(reversed(self.layers.values())).following = layer
        self.layers[self._layer] = layer
        return layer

    def _expert_bytes(self, host: HostExperts) -> int:
        return sum(
            self.backend.device_bytes(tensor.type, tensor.nbytes // host.experts)
            for tensor in host.tensors
        )

"""The layer loop on MLX: long pieces layer by layer, single tokens by graphs built once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from localds.models.decoder import Decoder, check_interrupt
from localds.ops.mlx.cache import DeviceCache
from localds.ops.mlx.computing import computing
from localds.ops.mlx.feed_forward import MlxMoe
from localds.ops.mlx.sampling import samples_on_device
from localds.ops.mlx.segments import SegmentGraph, divide
from localds.ops.mlx.split import SplitMoe
from localds.ops.mlx.stream import pipelined

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from threading import Event

    from numpy.typing import NDArray

    from localds.memory.latents import LatentCache, LayerCache
    from localds.ops.mlx.segments import Chosen
    from localds.sampling import Sampler

STEPS_KEPT = 4
"""Sizes of the cache for which graphs are kept."""

# How often the experts on the device are chosen anew, and how many of a layer's slots may change.
_LONG = 32
_TOKENS_BETWEEN = 64
_SHARE_OF_SLOTS = 4


@dataclass(frozen=True, slots=True)
class MlxDecoder(Decoder[mx.array]):
    """A model prepared on MLX. All of it runs in `stream`, from any thread, but one at a time."""

    stream: mx.Stream
    _steps: dict[tuple[int, str], list[SegmentGraph]] = field(default_factory=dict, init=False)
    _chosen: Chosen = field(default_factory=deque, init=False)
    _since: list[int] = field(default_factory=lambda: [0], init=False)

    def new_cache(self, capacity: int, cache_type: str) -> LatentCache:
        """A cache whose rows lie on the device."""
        g = self.geometry
        computed = "gpu and cpu" if self.splits else "gpu"
        return DeviceCache(g.layers, g.cache_width, capacity, cache_type, self.stream, computed)

    def forward(
        self,
        ids: NDArray[np.int32],
        cache: LatentCache,
        *,
        last_only: bool = True,
        interrupt: Event | None = None,
        on_share: Callable[[float], None] | None = None,
    ) -> NDArray[np.float32]:
        """As in `Decoder`. An interrupt ends the pass between layers."""
        check_interrupt(interrupt)
        rows = _on_device(cache)
        with computing(self.stream):
            if len(ids) == 1:
                self._check_ids(ids)
                logits = np.array(self.step(mx.array(ids), rows))
            else:
                x = self._run_layers(ids, rows, interrupt, on_share)
                logits = self.head(x, last_only=last_only)
            rows.extend_computed(len(ids))
            self._count(0)
            self._follow_use(len(ids))
        return logits

    def states(self, ids: NDArray[np.int32], cache: LatentCache) -> mx.array:
        """As in `Decoder`."""
        rows = _on_device(cache)
        with computing(self.stream):
            x = self._run_layers(ids, rows)
            mx.eval(x)
            rows.extend_computed(len(ids))
            self._count(0)
        return x

    def tokens(
        self,
        logits: NDArray[np.float32],
        cache: LatentCache,
        sampler: Sampler,
        history: list[int],
        interrupt: Event | None = None,
    ) -> Generator[int, None, None]:
        """As in `Decoder`; where all lies on the device, each step is begun before it is asked for.

        That takes sampling on the device, which knows neither penalties nor biases.
        """
        if self.splits or not samples_on_device(sampler.params):
            return Decoder.tokens(self, logits, cache, sampler, history, interrupt)
        rows = _on_device(cache)
        return pipelined(self.step, logits, rows, sampler, history, interrupt, self.stream)

    @property
    def splits(self) -> bool:
        """Whether some experts lie with the host."""
        return any(isinstance(layer.feed_forward, SplitMoe) for layer in self.layers)

    def step(self, ids: mx.array, cache: DeviceCache) -> mx.array:
        """Logits float32 [1, n_vocab] of the one token `ids` int32 [1], not yet computed.

        The cache is not extended. Its rows and the logits are computed when the latter are read,
        those of a split model but for the last layers at once. To be called in `stream`.
        """
        cache.reserve(1)
        cache.upload()
        x: mx.array = ids
        past = mx.array([cache.length], mx.int32)
        for graph in self._graphs(cache):
            x = graph(x, past, cache.device, self._chosen)
        self._count(keep=2)
        return x

    def _graphs(self, cache: DeviceCache) -> list[SegmentGraph]:
        """The graphs of one token at any position that the rows reserved now have room for."""
        first = cache.device[0]
        reserved = len(first.rows)
        key = reserved, first.type.name
        if key not in self._steps:
            while len(self._steps) >= STEPS_KEPT:
                del self._steps[next(iter(self._steps))]
            for layer in self.layers:
                layer.attention.turns.reserve(reserved)  # type: ignore[attr-defined]
            segments = divide(self.embedding, self.layers, self.head)
            self._steps[key] = [SegmentGraph(s, first.type, first.width) for s in segments]
        return self._steps[key]

    def _run_layers(
        self,
        ids: NDArray[np.int32],
        cache: LatentCache,
        interrupt: Event | None = None,
        on_share: Callable[[float], None] | None = None,
    ) -> mx.array:
        rows = _on_device(cache)
        rows.reserve(len(ids))
        rows.upload()
        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            after = layer.attention(x, cast("LayerCache", rows.device[index]), rows.length)
            if isinstance(layer.feed_forward, MlxMoe):
                routed = layer.feed_forward.route(after)
                self._chosen.append(([layer.feed_forward], routed.ids[None]))
                after = layer.feed_forward.add_experts(after, routed)
            else:
                after = layer.feed_forward(after)
            mx.async_eval(after, rows.device[index].rows)  # type: ignore[no-untyped-call]
            mx.eval(x)  # so that no more than two layers' work lies in memory
            x = after
            check_interrupt(interrupt)
            if on_share:
                on_share((index + 1) / len(self.layers))
        return x

    def _count(self, keep: int) -> None:
        """Count the experts that were chosen, but for the last `keep` times: they may still run."""
        while len(self._chosen) > keep:
            layers, ids = self._chosen.popleft()
            for layer, row in zip(layers, np.array(ids), strict=True):
                layer.counter.add(row)

    def _follow_use(self, n: int) -> None:
        """Have the experts on the device that are used most."""
        self._since[0] += n
        if n < _LONG and self._since[0] < _TOKENS_BETWEEN:
            return
        self._since[0] = 0
        for layer in self.layers:
            if isinstance(layer.feed_forward, SplitMoe):
                slots = len(layer.feed_forward.slots.experts)
                layer.feed_forward.reselect(-(-slots // _SHARE_OF_SLOTS) if n >= _LONG else 1)

    def _check_ids(self, ids: NDArray[np.int32]) -> None:
        cast("Any", self.embedding).check(ids)


def _on_device(cache: LatentCache) -> DeviceCache:
    if not isinstance(cache, DeviceCache):
        raise TypeError("a model on a GPU needs a cache of its own: take it from new_cache")
    return cache

"""The layer loop on MLX: long pieces as they come, single tokens by one graph, built once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from localds import models
from localds.models.decoder import Decoder, Interrupted
from localds.ops.mlx.cache import DeviceRows, make_rows
from localds.ops.mlx.ops import MlxOps

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event

    from numpy.typing import NDArray

    from localds.gguf import GGUFFile
    from localds.memory.latents import LatentCache, LayerCache
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.ops import MlxHead

    Step = Callable[[mx.array, mx.array, list[mx.array]], tuple[mx.array, list[mx.array]]]

STEPS_KEPT = 4


@dataclass(frozen=True, slots=True)
class MlxDecoder(Decoder[mx.array]):
    """A model prepared on MLX's default device.

    A `LatentCache` only counts its tokens here: its rows lie on the device, in what this decoder
    keeps for it. The memory in the process that it reserves is never touched.
    """

    _rows: WeakKeyDictionary[LatentCache, list[DeviceRows]] = field(
        default_factory=WeakKeyDictionary, init=False
    )
    _steps: dict[tuple[int, mx.Dtype], Step] = field(default_factory=dict, init=False)

    def forward(
        self,
        ids: NDArray[np.int32],
        cache: LatentCache,
        *,
        last_only: bool = True,
        interrupt: Event | None = None,
        on_share: Callable[[float], None] | None = None,  # noqa: ARG002  it comes all at once
    ) -> NDArray[np.float32]:
        """As in `Decoder`; an interrupt ends the pass only before it begins."""
        if interrupt is not None and interrupt.is_set():
            raise Interrupted
        if len(ids) == 1:
            logits = np.array(self.step(self._checked(ids), cache))
        else:
            x = self._run_layers(ids, cache)
            logits = self.head(x, last_only=last_only)
        cache.extend(len(ids))
        return logits

    def step(self, ids: mx.array, cache: LatentCache) -> mx.array:
        """Logits float32 [1, n_vocab] of the one token `ids` int32 [1], not yet computed.

        The cache is not extended. Its rows and the logits are computed when the latter are read.
        """
        cache.reserve(1)
        layers = self._device_rows(cache)
        for layer in layers:
            layer.reserve(cache.length + 1)
        key = len(layers[0].rows), layers[0].rows.dtype
        if key not in self._steps:
            while len(self._steps) >= STEPS_KEPT:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = self._make_step(cache.length)
        past = mx.array([cache.length], mx.int32)
        logits, rows = self._steps[key](ids, past, [layer.rows for layer in layers])
        for layer, updated in zip(layers, rows, strict=True):
            layer.rows = updated
        return logits

    def _make_step(self, past: int) -> Step:
        """The graph of one token at any position that the rows reserved now have room for."""
        for layer in self.layers:
            layer.attention.turns.reserve(past + 1)  # type: ignore[attr-defined]

        def step(
            ids: mx.array, past: mx.array, rows: list[mx.array]
        ) -> tuple[mx.array, list[mx.array]]:
            caches = [DeviceRows(array) for array in rows]
            x = self.embedding(ids)  # type: ignore[arg-type]
            for layer, cache in zip(self.layers, caches, strict=True):
                x = layer.attention(x, cast("LayerCache", cache), past)  # type: ignore[arg-type]
                x = layer.feed_forward(x)
            logits = cast("MlxHead", self.head).logits(x)
            return logits, [cache.rows for cache in caches]

        # On the CPU, MLX would call a C++ compiler.
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        return cast("Step", mx.compile(step)) if on_gpu else step

    def _run_layers(
        self,
        ids: NDArray[np.int32],
        cache: LatentCache,
        interrupt: Event | None = None,  # noqa: ARG002  the graph runs as a whole
        on_share: Callable[[float], None] | None = None,  # noqa: ARG002
    ) -> mx.array:
        past = cache.length
        cache.reserve(len(ids))
        x = self.embedding(ids)
        for layer, rows in zip(self.layers, self._device_rows(cache), strict=True):
            rows.reserve(past + len(ids))
            x = layer.attention(x, cast("LayerCache", rows), past)
            x = layer.feed_forward(x)
        return x

    def _checked(self, ids: NDArray[np.int32]) -> mx.array:
        self.embedding.check(ids)  # type: ignore[attr-defined]
        return mx.array(ids)

    def _device_rows(self, cache: LatentCache) -> list[DeviceRows]:
        if cache not in self._rows:
            self._rows[cache] = [make_rows(layer, cache.capacity) for layer in cache.layers]
        return self._rows[cache]


def build_decoder(gguf: GGUFFile, backend: Backend) -> MlxDecoder:
    """Prepare the model in `gguf`; raises `GGUFError` for what does not fit."""
    built = models.build(gguf, MlxOps(backend))
    mx.clear_cache()  # what loading took apart
    return MlxDecoder(built.geometry, built.embedding, built.layers, built.head)

"""The graph of one token, in pieces that end where the host has to choose.

Where all experts lie on the device, there is one piece. Each layer that is split ends one: its
attention and its router belong to that piece, its experts are computed in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from localds.ops.mlx.cache import DeviceRows
from localds.ops.mlx.computing import on_gpu
from localds.ops.mlx.feed_forward import MlxMoe, Routed
from localds.ops.mlx.split import SplitMoe

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Sequence

    from localds.gguf import GGMLType
    from localds.models.decoder import Layer
    from localds.ops import Embedding, Head
    from localds.ops.mlx.ops import MlxHead

    Arrays = list[mx.array]
    Chosen = deque[tuple[list[MlxMoe], mx.array]]


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers from number `start` on; only the last may be split.

    The first segment has the `embedding` and is given ids, the last the `head` and gives logits.
    """

    start: int
    layers: Sequence[Layer[mx.array]]
    embedding: Embedding[mx.array] | None
    head: Head[mx.array] | None

    @property
    def split(self) -> SplitMoe | None:
        """The feed-forward of the last layer, if that is split."""
        last = self.layers[-1].feed_forward if self.layers else None
        return last if isinstance(last, SplitMoe) else None

    def trace(self, x: mx.array, past: mx.array, caches: Sequence[DeviceRows]) -> Arrays:
        """What comes out, with a row more in the caches.

        That is x, then the ids that whole layers chose [layers, top_k], if there are such layers,
        then of a split one what `Routed` holds.
        """
        if self.embedding is not None:
            x = self.embedding(cast("Any", x))
        chosen: Arrays = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.attention(x, cast("Any", cache), cast("Any", past))
            if isinstance(layer.feed_forward, MlxMoe):
                routed = layer.feed_forward.route(x)
                chosen.append(routed.ids)
                x = layer.feed_forward.add_experts(x, routed)
            elif not isinstance(layer.feed_forward, SplitMoe):
                x = layer.feed_forward(x)
        if self.head is not None:
            x = cast("MlxHead", self.head).logits(x)
        out = [x, mx.concatenate(chosen)] if chosen else [x]
        if self.split is not None:
            routed = self.split.route(x)
            out += [routed.states, routed.ids, routed.weights]
        return out


class SegmentGraph:
    """A segment made ready to run, for rows of one form; it is traced when it first runs."""

    def __init__(self, segment: Segment, kind: GGMLType, width: int) -> None:
        def trace(x: mx.array, past: mx.array, rows: Arrays) -> tuple[Arrays, Arrays]:
            caches = [DeviceRows(array, kind, width) for array in rows]
            out = segment.trace(x, past, caches)
            return out, [cache.rows for cache in caches]

        self._run: Callable[..., tuple[Arrays, Arrays]] = mx.compile(trace) if on_gpu() else trace
        self._segment = segment
        forwards = [layer.feed_forward for layer in segment.layers]
        self._whole = [forward for forward in forwards if isinstance(forward, MlxMoe)]

    def __call__(
        self, x: mx.array, past: mx.array, device: Sequence[DeviceRows], chosen: Chosen
    ) -> mx.array:
        """X after the segment, at position `past` int32 [1]; adds to what was `chosen`."""
        segment = self._segment
        mine = device[segment.start : segment.start + len(segment.layers)]
        (x, *others), rows = self._run(x, past, [layer.rows for layer in mine])
        for layer, updated in zip(mine, rows, strict=True):
            layer.rows = updated
        if self._whole:
            ids, *others = others
            chosen.append((self._whole, ids))
        return x if segment.split is None else segment.split.add_experts(x, Routed(*others))


def divide(
    embedding: Embedding[mx.array], layers: Sequence[Layer[mx.array]], head: Head[mx.array]
) -> list[Segment]:
    """The segments of a model."""
    starts = [0]
    for index, layer in enumerate(layers):
        if isinstance(layer.feed_forward, SplitMoe):
            starts.append(index + 1)
    ends = [*starts[1:], len(layers)]
    return [
        Segment(
            start,
            layers[start:end],
            embedding if number == 0 else None,
            head if number == len(starts) - 1 else None,
        )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]

"""The attention cache in device memory: per layer one array of rows, grown in steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from localds.gguf import GGMLType
from localds.memory.latents import LayerCache

if TYPE_CHECKING:
    from localds.ops import Rope

STEP = 1024
"""Rows by which a layer's array grows: only then are rows copied."""

DTYPES = {GGMLType.F32: mx.float32, GGMLType.F16: mx.float16}


@dataclass(slots=True)
class DeviceRows:
    """One layer's rows, [reserved, width] of which the first are in use; at most `capacity`."""

    rows: mx.array
    capacity: int = 0

    def reserve(self, length: int) -> None:
        """Have room for `length` rows, which are no more than the capacity."""
        reserved, width = self.rows.shape
        if length > reserved:
            grown = min(-(-length // STEP) * STEP, self.capacity)
            more = mx.zeros((grown - reserved, width), self.rows.dtype)
            self.rows = mx.concatenate([self.rows, more])

    def write(self, rows: mx.array, past: int | mx.array) -> mx.array:
        """Put `rows` [n, width] after the first `past`; returns the rows that may be attended to.

        With `past` an array int32 [1], these are all that are reserved, for a graph that serves any
        position. Room must have been reserved before.
        """
        start = mx.array([past], mx.int32) if isinstance(past, int) else past
        self.rows = mx.slice_update(self.rows, rows.astype(self.rows.dtype), start, axes=[0])
        return self.rows[: past + len(rows)] if isinstance(past, int) else self.rows


def make_rows(layer: LayerCache, capacity: int) -> DeviceRows:
    """Rows on the device in place of a layer's; memory is taken as they are written.

    Raises `ValueError` for a type that is not f16 or f32.
    """
    if layer.type not in DTYPES:
        raise ValueError(
            f"cache type {layer.type.name.lower()} is not one that the GPU computes with; "
            "choose f16 or f32"
        )
    return DeviceRows(mx.zeros((0, layer.width), DTYPES[layer.type]), capacity)


def device_rows(cache: LayerCache) -> DeviceRows:
    """The rows that `MlxDecoder` passes on; raises `TypeError` for those of another device."""
    if not isinstance(cache, DeviceRows):
        raise TypeError(f"attention on MLX needs DeviceRows, not {type(cache).__name__}")
    return cache


class Turns:
    """Cosines and sines of a rope by position, kept on the device and extended when needed.

    `table` is float32 [2, positions, pairs].
    """

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self.table = mx.zeros((2, 0, len(rope.inverse_frequencies)))

    def reserve(self, length: int) -> None:
        """Have a table of at least `length` positions."""
        if length > self.table.shape[1]:
            positions = np.arange(-(-length // STEP) * STEP)
            # In double: a float angle is off by 0.01 at position 100,000.
            angles = np.outer(positions, self._rope.inverse_frequencies.astype(np.float64))
            table = np.stack([np.cos(angles), np.sin(angles)]) * self._rope.amplitude
            self.table = mx.array(table.astype(np.float32))

    def rotate(self, x: mx.array, past: int | mx.array) -> mx.array:
        """Turn the pairs (2i, 2i + 1) of x [..., n, 2 * pairs], at position `past` and on."""
        n = x.shape[-2]
        cosine, sine = self.table[:, mx.arange(n) + past]
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = mx.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
        return turned.reshape(x.shape)

"""The attention cache in device memory: per layer one array of rows, grown in steps."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from localds.gguf import GGMLType
from localds.memory.latents import LatentCache, LayerCache
from localds.ops.mlx.computing import computing

if TYPE_CHECKING:
    from localds.ops import Rope

STEP = 1024
"""Rows by which a layer's array grows: only then are rows copied."""

DTYPES = {GGMLType.F32: mx.float32, GGMLType.F16: mx.float16, GGMLType.Q8_0: mx.uint8}
"""What an array of rows holds: values, or the bytes of blocks."""

_NUMPY = {GGMLType.F32: np.float32, GGMLType.F16: np.float16, GGMLType.Q8_0: np.uint8}
_Q8_0 = GGMLType.Q8_0


@dataclass(slots=True)
class DeviceRows:
    """One layer's rows, of which the first are in use; at most `capacity`.

    `rows` is [reserved, width] of float32 or float16 or, for q8_0, uint8 [reserved, row bytes].
    """

    rows: mx.array
    type: GGMLType
    width: int
    capacity: int = 0

    def reserve(self, length: int) -> None:
        """Have room for `length` rows; raises `ValueError` for more than the capacity.

        What grows is evaluated at once, so that never two layers have their rows twice.
        """
        if length > self.capacity:
            raise ValueError(f"reserve {length} rows: the capacity is {self.capacity}")
        reserved, columns = self.rows.shape
        if length > reserved:
            grown = min(-(-length // STEP) * STEP, self.capacity)
            more = mx.zeros((grown - reserved, columns), self.rows.dtype)
            self.rows = mx.concatenate([self.rows, more]) if reserved else more
            del more
            mx.eval(self.rows)
            if reserved:
                mx.clear_cache()  # No array will have the size of the old one again.

    def write(self, rows: mx.array, past: int | mx.array) -> mx.array:
        """Put `rows` after the first `past`; returns the rows that may be attended to, as kept.

        The new ones are values [n, width], or in the form in which they are kept. With `past` an
        array int32 [1], all that are reserved are returned, for a graph that serves any position.
        Room must have been reserved before.
        """
        start = mx.array([past], mx.int32) if isinstance(past, int) else past
        self.rows = mx.slice_update(self.rows, encoded(rows, self.type), start, axes=[0])
        return self.rows[: past + len(rows)] if isinstance(past, int) else self.rows


def encoded(rows: mx.array, kind: GGMLType) -> mx.array:
    """Rows [n, width] as a cache of that type keeps them; those that are so already stay.

    Blocks of q8_0 have the bytes that the native library and ggml's reference write.
    """
    if kind is not _Q8_0 or rows.dtype == mx.uint8:
        return rows.astype(DTYPES[kind])
    blocks = rows.astype(mx.float32).reshape(len(rows), -1, 32)
    sizes = mx.abs(blocks)
    scale = sizes.max(axis=-1, keepdims=True) / 127
    scaled = sizes * mx.where(scale == 0, 0, 1 / scale)
    # Halves go away from zero. Of a scale that is no normal number, the inverse is infinite.
    whole = mx.floor(scaled)
    rounded = mx.minimum(mx.where(scaled - whole >= 0.5, whole + 1, whole), 127)
    integers = (mx.sign(blocks) * rounded).astype(mx.int8)
    parts = [scale.astype(mx.float16).view(mx.uint8), integers.view(mx.uint8)]
    return mx.concatenate(parts, axis=-1).reshape(len(rows), -1)


def decoded(rows: mx.array, dtype: mx.Dtype) -> mx.array:
    """The values [n, width] of rows as they are kept. Float16 rounds those of q8_0 once."""
    if rows.dtype != mx.uint8:
        return rows.astype(dtype)
    blocks = rows.reshape(len(rows), -1, _Q8_0.block_bytes)
    scale = mx.contiguous(blocks[..., :2]).view(mx.float16).astype(dtype)
    integers = mx.contiguous(blocks[..., 2:]).view(mx.int8).astype(dtype)
    return (integers * scale).reshape(len(rows), -1)


def cached_width(rows: mx.array) -> int:
    """Values in each of `rows` as they are kept."""
    columns = rows.shape[1]
    return (
        columns // _Q8_0.block_bytes * _Q8_0.block_elements if rows.dtype == mx.uint8 else columns
    )


def make_rows(layer: LayerCache, capacity: int) -> DeviceRows:
    """Rows on the device in place of a layer's; memory is taken as they are reserved."""
    columns = layer.data.shape[1] if layer.type is _Q8_0 else layer.width
    rows = mx.zeros((0, columns), DTYPES[layer.type])
    return DeviceRows(rows, layer.type, layer.width, capacity)


def device_rows(cache: LayerCache) -> DeviceRows:
    """The rows that `MlxDecoder` passes on; raises `TypeError` for those of another device."""
    if not isinstance(cache, DeviceRows):
        raise TypeError(f"attention on MLX needs DeviceRows, not {type(cache).__name__}")
    return cache


class DeviceCache(LatentCache):
    """Rows of all layers on the device, `device`; the memory in the process is a mirror of them.

    With 0 <= mirrored <= uploaded <= length, the device holds the rows before `uploaded`; the
    mirror holds those before `mirrored`, and those from `uploaded` on, which were written there.
    So every row is in one of them, and what is missing in the other is copied when it is needed:
    `rows` completes the mirror, `upload` the device. Rows before `length` are only read. Every
    method but `rows` is for the thread that computes; it may not compute while `rows` copies.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        capacity: int,
        cache_type: str,
        stream: mx.Stream,
        computed: str = "gpu",
    ) -> None:
        """`computed` says how rows are computed, where that makes a difference."""
        super().__init__(layers, width, capacity, cache_type)
        self._stream = stream
        self._computed = computed
        self._mirrored = 0
        self._uploaded = 0
        self._copying = Lock()
        with computing(stream):
            self.device = [make_rows(layer, capacity) for layer in self.layers]

    @property
    def layout(self) -> str:
        """As in `LatentCache`, but told apart: the CPU computes other low bits."""
        return f"{super().layout} {self._computed}"

    def rows(self, start: int, stop: int) -> list[memoryview]:
        """As in `LatentCache`; rows before `length` are copied from the device if need be."""
        if start < self._uploaded and stop > self._mirrored:
            with self._copying:
                self._download()
        return super().rows(start, stop)

    def reserve(self, n_tokens: int) -> None:
        """Have room on the device for `n_tokens` more; raises `ContextError` as `LatentCache`."""
        super().reserve(n_tokens)
        with computing(self._stream):
            for rows in self.device:
                rows.reserve(self.length + n_tokens)

    def upload(self) -> None:
        """Bring to the device what was written in the mirror; before every forward pass."""
        start, stop = self._uploaded, self.length
        if start == stop:
            return
        with computing(self._stream):
            for layer, rows in zip(self.layers, self.device, strict=True):
                rows.reserve(stop)
                values = layer.data[start:stop].view(_NUMPY[layer.type])
                rows.write(mx.array(values), start)
                mx.eval(rows.rows)
        if self._mirrored == start:
            self._mirrored = stop
        self._uploaded = stop

    def extend_computed(self, n_tokens: int) -> None:
        """Count `n_tokens` rows, written by every layer on the device, as filled.

        `extend` counts rows that were written in the mirror. Raises `RuntimeError` where some of
        these were not uploaded before.
        """
        if self._uploaded != self.length:
            missing = self.length - self._uploaded
            raise RuntimeError(f"extend_computed: {missing} rows were not uploaded; call upload()")
        self.extend(n_tokens)
        self._uploaded = self.length

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        super().truncate(length)
        self._uploaded = min(self._uploaded, length)
        self._mirrored = min(self._mirrored, length)

    def _download(self) -> None:
        """Complete the mirror."""
        start, stop = self._mirrored, self._uploaded
        if start == stop:
            return
        with computing(self._stream):
            for layer, rows in zip(self.layers, self.device, strict=True):
                # A copy: CUDA would move the array that numpy reads to memory of the host.
                copy = mx.take(rows.rows, mx.arange(start, stop), axis=0)
                layer.data[start:stop] = np.asarray(copy).view(np.uint8)
        self._mirrored = stop


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

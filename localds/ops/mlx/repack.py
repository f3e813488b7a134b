"""Block types that MLX has a form for, repacked into it without loss.

The affine form holds value = integer * scale + offset in groups of 32, its scales and offsets in
float32: a scale of Q4_K is a float16 times 6 bits, which no 16-bit float holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.blocks import unpack

AFFINE_BITS = {
    GGMLType.Q4_0: 4,
    GGMLType.Q4_1: 4,
    GGMLType.Q5_0: 5,
    GGMLType.Q5_1: 5,
    GGMLType.Q8_0: 8,
    GGMLType.Q4_K: 4,
    GGMLType.Q5_K: 5,
}


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [..., rows, columns] in MLX's form: `words` uint32, `scales`, and `biases`."""

    words: mx.array
    scales: mx.array
    biases: mx.array | None
    bits: int
    mode: Literal["affine", "mxfp4"]

    def arrays(self) -> tuple[mx.array, mx.array, mx.array | None]:
        """What `quantized_matmul` takes after x."""
        return self.words, self.scales, self.biases

    def map(self, change: mx.array) -> Packed:
        """The matrices or rows `change` of the first axis."""
        biases = None if self.biases is None else self.biases[change]
        return Packed(self.words[change], self.scales[change], biases, self.bits, self.mode)


def has_form(kind: GGMLType) -> bool:
    """Whether `repack` takes the type."""
    return kind in AFFINE_BITS or kind is GGMLType.MXFP4


def repack(kind: GGMLType, blocks: mx.array) -> Packed:
    """Repack `blocks` uint8 [..., rows, bytes]."""
    if kind is GGMLType.MXFP4:
        return _repack_mxfp4(blocks)
    groups = unpack(kind, blocks)
    bits = AFFINE_BITS[kind]
    flat = groups.integers.reshape(*blocks.shape[:-1], -1)
    return Packed(_pack(flat, bits), groups.scale, groups.offset, bits, "affine")


def _pack(integers: mx.array, bits: int) -> mx.array:
    """Values [..., n] below 2^bits as one stream of bits, lowest first, in uint32 words."""
    lead = integers.shape[:-1]
    if bits == 8:
        return mx.contiguous(integers).view(mx.uint32)
    eights = integers.reshape(*lead, -1, 8).astype(mx.uint64)
    streams = (eights << (mx.arange(8, dtype=mx.uint64) * bits)).sum(axis=-1)
    as_bytes = streams[..., None].view(mx.uint8)[..., :bits]
    return mx.contiguous(as_bytes.reshape(*lead, -1)).view(mx.uint32)


def _repack_mxfp4(blocks: mx.array) -> Packed:
    parts = blocks.reshape(*blocks.shape[:-1], -1, 17)
    nibbles = mx.concatenate([parts[..., 1:] & 15, parts[..., 1:] >> 4], axis=-1)
    words = _pack(nibbles.reshape(*blocks.shape[:-1], -1), 4)
    return Packed(words, mx.contiguous(parts[..., 0]), None, 4, "mxfp4")

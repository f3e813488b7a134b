"""Block types that MLX has a form for, repacked into it without loss.

The affine form holds value = integer * scale + offset in groups of 32, its scales and offsets in
float32: a scale of Q4_K is a float16 times 6 bits, which no 16-bit float holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.blocks import unpack

if TYPE_CHECKING:
    from collections.abc import Callable

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

    def map(self, change: Callable[[mx.array], mx.array]) -> Packed:
        """The same change made to all arrays."""
        biases = None if self.biases is None else change(self.biases)
        return Packed(change(self.words), change(self.scales), biases, self.bits, self.mode)

    def put(self, index: int, part: Packed) -> Packed:
        """With what `part` holds from `index` of the first axis on, see `replaced`."""
        biases = None
        if self.biases is not None and part.biases is not None:
            biases = replaced(self.biases, index, part.biases)
        words = replaced(self.words, index, part.words)
        return Packed(
            words, replaced(self.scales, index, part.scales), biases, self.bits, self.mode
        )


def replaced(whole: mx.array, index: int, part: mx.array) -> mx.array:
    """`whole` with `part` from `index` of the first axis on; a part may lack that axis."""
    if part.ndim < whole.ndim:
        part = part[None]
    return mx.slice_update(whole, part, mx.array([index]), axes=[0])


def packed_group_bytes(kind: GGMLType) -> int:
    """Bytes of 32 values of a type that `repack` takes."""
    # One byte says how large the values of MXFP4 are; the affine form has two float32 for that.
    return 17 if kind is GGMLType.MXFP4 else 4 * AFFINE_BITS[kind] + 8


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

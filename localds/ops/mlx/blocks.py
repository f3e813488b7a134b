"""GGUF blocks taken apart by MLX operations, on any device: the oracle of every kernel.

A block type is read as groups of small integers: value = integer * scale + offset. Layouts are
those of ggml's `dequantize_row_*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.gguf import GGMLType

if TYPE_CHECKING:
    from collections.abc import Callable

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the value of each 4-bit float, which the type's own scale halves."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Integers [..., groups, group], with `scale` and `offset` float32 [..., groups] or None."""

    integers: mx.array
    scale: mx.array
    offset: mx.array | None = None


def unpack(kind: GGMLType, blocks: mx.array) -> Groups:
    """The groups of `blocks` uint8 [..., bytes], whole blocks in the last axis."""
    parts = blocks.reshape(*blocks.shape[:-1], -1, kind.block_bytes)
    groups = _READERS[kind](parts)
    lead = blocks.shape[:-1]
    return Groups(
        groups.integers.reshape(*lead, -1, groups.integers.shape[-1]),
        groups.scale.reshape(*lead, -1),
        None if groups.offset is None else groups.offset.reshape(*lead, -1),
    )


def dequantize(kind: GGMLType, blocks: mx.array) -> mx.array:
    """The values float32 [..., columns] of `blocks` uint8 [..., bytes]."""
    groups = unpack(kind, blocks)
    values = groups.integers.astype(mx.float32) * groups.scale[..., None]
    if groups.offset is not None:
        values = values + groups.offset[..., None]
    return values.reshape(*blocks.shape[:-1], -1)


def _half(b: mx.array, at: int) -> mx.array:
    """The float16 at byte `at` of each block, as float32 [..., 1]."""
    return mx.contiguous(b[..., at : at + 2]).view(mx.float16).astype(mx.float32)


def _nibbles(b: mx.array) -> mx.array:
    """The low halves of the bytes [..., n], then the high ones: [..., 2n]."""
    return mx.concatenate([b & 15, b >> 4], axis=-1)


def _fifth_bits(b: mx.array) -> mx.array:
    """The bits of 4 bytes, one per value, as 0 or 16: [..., 32]."""
    bits = (b[..., None] >> mx.arange(8, dtype=mx.uint8)) & 1
    return bits.reshape(*b.shape[:-1], 32) << 4


def _q4_0(b: mx.array) -> Groups:
    d = _half(b, 0)
    return Groups(_nibbles(b[..., 2:]), d, -8 * d)


def _q4_1(b: mx.array) -> Groups:
    return Groups(_nibbles(b[..., 4:]), _half(b, 0), _half(b, 2))


def _q5_0(b: mx.array) -> Groups:
    d = _half(b, 0)
    return Groups(_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6]), d, -16 * d)


def _q5_1(b: mx.array) -> Groups:
    return Groups(_nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8]), _half(b, 0), _half(b, 2))


def _q8_0(b: mx.array) -> Groups:
    d = _half(b, 0)
    return Groups(b[..., 2:] ^ 128, d, -128 * d)  # from two's complement to 0..255


def _twos(b: mx.array) -> mx.array:
    """The 2-bit fields of 32 or 64 bytes: per 32 bytes, their lowest fields first [..., 4n]."""
    rows = b.reshape(*b.shape[:-1], -1, 1, 32)
    fields = (rows >> mx.array([[0], [2], [4], [6]], mx.uint8)) & 3
    return fields.reshape(*b.shape[:-1], -1)


def _sixteens(b: mx.array) -> mx.array:
    return b.reshape(*b.shape[:-1], 16, 16)


def _q2_k(b: mx.array) -> Groups:
    d, d_min = _half(b, 80), _half(b, 82)
    scales = b[..., :16]
    return Groups(
        _sixteens(_twos(b[..., 16:80])),
        d * (scales & 15).astype(mx.float32),
        -d_min * (scales >> 4).astype(mx.float32),
    )


def _q3_k(b: mx.array) -> Groups:
    high = (b[..., None, :32] >> mx.arange(8, dtype=mx.uint8)[:, None]) & 1
    integers = _twos(b[..., 32:96]) | (high.reshape(*b.shape[:-1], 256) << 2)
    low = _nibbles(b[..., 96:104])
    top = (b[..., None, 104:108] >> mx.array([[0], [2], [4], [6]], mx.uint8)) & 3
    scales = low | (top.reshape(*b.shape[:-1], 16) << 4)
    signed = scales.astype(mx.float32) - 32
    return Groups(_sixteens(integers.astype(mx.int8) - 4), _half(b, 108) * signed)


def _six_bit_pairs(b: mx.array) -> tuple[mx.array, mx.array]:
    """The 8 scales and 8 minima of Q4_K and Q5_K from their 12 bytes."""
    first, second, rest = b[..., :4], b[..., 4:8], b[..., 8:12]
    scales = mx.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], axis=-1)
    minima = mx.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales.astype(mx.float32), minima.astype(mx.float32)


def _nibble_rows(b: mx.array) -> mx.array:
    """Each 32 bytes are the low halves of one sub-block and the high ones of the next."""
    rows = b.reshape(*b.shape[:-1], 4, 1, 32)
    return mx.concatenate([rows & 15, rows >> 4], axis=-2).reshape(*b.shape[:-1], 8, 32)


def _q4_k(b: mx.array) -> Groups:
    scales, minima = _six_bit_pairs(b[..., 4:16])
    return Groups(_nibble_rows(b[..., 16:]), _half(b, 0) * scales, -_half(b, 2) * minima)


def _q5_k(b: mx.array) -> Groups:
    scales, minima = _six_bit_pairs(b[..., 4:16])
    high = (b[..., None, 16:48] >> mx.arange(8, dtype=mx.uint8)[:, None]) & 1
    integers = _nibble_rows(b[..., 48:]) | (high << 4)
    return Groups(integers, _half(b, 0) * scales, -_half(b, 2) * minima)


def _q6_k(b: mx.array) -> Groups:
    low = b[..., :128].reshape(*b.shape[:-1], 2, 1, 64)
    low = mx.concatenate([low & 15, low >> 4], axis=-2).reshape(*b.shape[:-1], 256)
    integers = (low | (_twos(b[..., 128:192]) << 4)).astype(mx.int8) - 32
    scales = mx.contiguous(b[..., 192:208]).view(mx.int8).astype(mx.float32)
    return Groups(_sixteens(integers), _half(b, 208) * scales)


def _chosen(values: tuple[int, ...], indices: mx.array) -> mx.array:
    return mx.array(values, mx.int8)[indices]


def _iq4_nl(b: mx.array) -> Groups:
    return Groups(_chosen(IQ4_VALUES, _nibbles(b[..., 2:])), _half(b, 0))


def _iq4_xs(b: mx.array) -> Groups:
    low = mx.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    top = (b[..., 2:4, None] >> mx.array([0, 2, 4, 6], mx.uint8)) & 3
    scales = low | (top.reshape(*b.shape[:-1], 8) << 4)
    nibbles = _nibbles(b[..., 8:].reshape(*b.shape[:-1], 8, 16))
    return Groups(_chosen(IQ4_VALUES, nibbles), _half(b, 0) * (scales.astype(mx.float32) - 32))


def _mxfp4(b: mx.array) -> Groups:
    # Through the float's bits: 2^(e - 128), of which e = 0 and 1 are below the normal numbers.
    exponent = b[..., :1].astype(mx.uint32)
    small = mx.array([0x00200000, 0x00400000], mx.uint32)[mx.minimum(exponent, 1)]
    bits = mx.where(exponent < 2, small, (mx.maximum(exponent, 1) - 1) << 23)
    return Groups(_chosen(MXFP4_VALUES, _nibbles(b[..., 1:])), bits.view(mx.float32))


_READERS: dict[GGMLType, Callable[[mx.array], Groups]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
}
QUANTIZED = tuple(_READERS)
"""The block types that are computed with."""

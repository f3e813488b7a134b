"""Blockwise dynamic quantization of an optimizer's moments to 8 bits (arXiv:2110.02861)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from localds.finetune.limits import BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DECADES = 7


@cache
def dynamic_map(signed: bool) -> NDArray[np.float32]:
    """The 256 values in [-1, 1], or in [0, 1], that a code stands for, ascending.

    Each decade from 1e-7 has twice the values of the decade below it, in the middles of equal
    parts; 0 and 1 are values besides.
    """
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        parts = 2 ** (decade if signed else decade + 1)
        bounds = np.linspace(0.1, 1, parts + 1)
        middles = 10.0 ** (decade + 1 - _DECADES) * (bounds[:-1] + bounds[1:]) / 2
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(values)).astype(np.float32)


@cache
def _tables(signed: bool) -> tuple[mx.array, mx.array]:
    values = dynamic_map(signed)
    return mx.array(values), mx.array((values[:-1] + values[1:]) / 2)


def quantize(values: mx.array, signed: bool) -> tuple[mx.array, mx.array]:
    """Codes [blocks, 256] uint8 and each block's largest magnitude [blocks] float32.

    A value becomes the nearest of the map. Without a sign nothing above 0 becomes 0: a second
    moment lost to rounding would make its parameter's next step many times too long.
    """
    blocks = mx.pad(values.reshape(-1), (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    largest = mx.abs(blocks).max(axis=1)
    shares = blocks / mx.where(largest > 0, largest, 1)[:, None]
    codes = mx.searchsorted(_tables(signed)[1], shares)
    if not signed:
        codes = mx.maximum(codes, (blocks > 0).astype(codes.dtype))
    return codes.astype(mx.uint8), largest


def dequantize(codes: mx.array, largest: mx.array, like: mx.array, signed: bool) -> mx.array:
    """The values that codes stand for, in the shape of `like`."""
    values = mx.take(_tables(signed)[0], codes) * largest[:, None]
    return mx.unflatten(values.reshape(-1)[: like.size], 0, like.shape)

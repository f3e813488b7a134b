"""A search for damaged weights: block scales, or values, that are not finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from localds.gguf.file import GGUFFile
from localds.gguf.tensor import Tensor
from localds.gguf.types import GGMLType

CHUNK_BYTES: Final = 4 << 20
"""Bytes of a tensor looked at together: few calls, and what is made on the way stays in cache."""


@dataclass(frozen=True, slots=True)
class _Scales:
    """Where a block holds floating-point numbers: byte offsets, width, and the exponent's bits.

    A number is infinite or not a number where all bits of `exponent` are set.
    """

    offsets: tuple[int, ...]
    width: str
    exponent: int


def _half(*offsets: int) -> _Scales:
    return _Scales(offsets, "<u2", 0x7C00)


_SCALES: Final = {
    GGMLType.F32: _Scales((0,), "<u4", 0x7F800000),
    GGMLType.F64: _Scales((0,), "<u8", 0x7FF0000000000000),
    GGMLType.F16: _half(0),
    GGMLType.BF16: _Scales((0,), "<u2", 0x7F80),
    GGMLType.Q4_0: _half(0),
    GGMLType.Q4_1: _half(0, 2),
    GGMLType.Q5_0: _half(0),
    GGMLType.Q5_1: _half(0, 2),
    GGMLType.Q8_0: _half(0),
    GGMLType.Q8_1: _half(0, 2),
    GGMLType.Q2_K: _half(80, 82),
    GGMLType.Q3_K: _half(108),
    GGMLType.Q4_K: _half(0, 2),
    GGMLType.Q5_K: _half(0, 2),
    GGMLType.Q6_K: _half(208),
    GGMLType.Q8_K: _Scales((0,), "<u4", 0x7F800000),
    GGMLType.IQ2_XXS: _half(0),
    GGMLType.IQ2_XS: _half(0),
    GGMLType.IQ2_S: _half(0),
    GGMLType.IQ3_XXS: _half(0),
    GGMLType.IQ3_S: _half(0),
    GGMLType.IQ1_S: _half(0),
    GGMLType.IQ4_NL: _half(0),
    GGMLType.IQ4_XS: _half(0),
    GGMLType.TQ1_0: _half(52),
    GGMLType.TQ2_0: _half(64),
    GGMLType.Q1_0: _half(0),
    GGMLType.Q2_0: _half(0),
    GGMLType.MXFP4: _Scales((0,), "u1", 0xFF),
}
"""Types that hold such numbers in whole bytes; integers, IQ1_M and NVFP4 do not."""


def find_nonfinite(
    gguf: GGUFFile, progress: Callable[[int, int], None] | None = None
) -> list[tuple[Tensor, int]]:
    """Tensors with infinite or NaN scales (values, where there are no blocks), and how many.

    Reads the whole file. `progress` is called with the bytes done and the bytes in all.
    """
    total = sum(tensor.nbytes for tensor in gguf.tensors.values())
    done = 0
    found: list[tuple[Tensor, int]] = []
    for tensor in gguf.tensors.values():
        count = 0
        for chunk in _chunks(tensor):
            count += _count_nonfinite(tensor.type, chunk)
            done += chunk.nbytes
            if progress is not None:
                progress(done, total)
        if count:
            found.append((tensor, count))
    return found


def _chunks(tensor: Tensor) -> list[NDArray[np.uint8]]:
    """Pieces of whole blocks, uint8 [n_blocks, block bytes]."""
    width = tensor.type.block_bytes
    blocks = tensor.data.reshape(-1, width)
    step = CHUNK_BYTES // width
    return [blocks[i : i + step] for i in range(0, len(blocks), step)]


def _count_nonfinite(kind: GGMLType, blocks: NDArray[np.uint8]) -> int:
    scales = _SCALES.get(kind)
    if scales is None:
        return 0
    width = np.dtype(scales.width).itemsize
    count = 0
    for offset in scales.offsets:
        numbers = blocks[:, offset : offset + width].view(scales.width)[:, 0]
        exponents = numbers & np.dtype(scales.width).type(scales.exponent)
        count += int(np.count_nonzero(exponents == scales.exponent))
    return count

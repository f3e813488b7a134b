"""Checkpoints in 8-bit floats and packed integers, beside the float32 values that they stand for.

A `Form` turns one weight into the tensors that hold it. What it stands for is computed here in
numpy, from the published descriptions of the formats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Tensors = dict[str, NDArray[Any]]

# Routers, embeddings, norms and the head are never quantized.
QUANTIZED = re.compile(r"(_proj|_proj_with_mqa|\.w[123])(\.weight)?$")


class Form(Protocol):
    """A way to store weights."""

    def config(self) -> dict[str, Any]:
        """quantization_config."""
        ...

    def store(self, name: str, weight: Floats) -> tuple[Tensors, Floats]:
        """The tensors for one weight, and the values that they stand for."""
        ...


@dataclass(frozen=True)
class Float8:
    """8-bit floats with a scale per block (rows, columns), per row, or (block None) for all."""

    method: str = "fp8"
    block: tuple[int, int] | None = (24, 40)
    per_row: bool = False
    dtype: Any = ml_dtypes.float8_e4m3fn
    scale_dtype: Any = np.float32

    def config(self) -> dict[str, Any]:
        if self.method == "fp8":
            block = list(self.block) if self.block else None
            return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
        if self.per_row:
            weights["strategy"] = "channel"
        elif self.block:
            weights |= {"strategy": "block", "block_structure": list(self.block)}
        else:
            weights["strategy"] = "tensor"
        group = {"targets": ["Linear"], "weights": weights}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
        }

    def store(self, name: str, weight: Floats) -> tuple[Tensors, Floats]:
        rows, columns = weight.shape[-2:]
        block = (1, columns) if self.per_row else self.block or (rows, columns)
        largest = float(ml_dtypes.finfo(self.dtype).max)
        scales = np.maximum(_block_maximum(np.abs(weight), block), 1e-6) / np.float32(largest)
        scales = scales.astype(self.scale_dtype)
        spread = _spread(scales.astype(np.float32), block)[..., :rows, :columns]
        stored = (weight / spread).astype(self.dtype)
        values = stored.astype(np.float32) * spread
        if not self.per_row and self.block is None and weight.ndim == 2:
            scales = scales.reshape(1)
        ending = "_scale_inv" if self.method == "fp8" else "_scale"
        return {name: stored, name + ending: scales}, values


@dataclass(frozen=True)
class PackedIntegers:
    """Integers in 32-bit words with a scale per `group` columns, or (None) per row."""

    bits: int = 4
    group: int | None = 16
    symmetric: bool = True
    scale_dtype: Any = ml_dtypes.bfloat16

    def config(self) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }

    def store(self, name: str, weight: Floats) -> tuple[Tensors, Floats]:
        columns = weight.shape[1]
        block = (1, self.group or columns)
        middle, top = 2 ** (self.bits - 1), 2**self.bits - 1
        low, high = -_block_maximum(-weight, block), _block_maximum(weight, block)
        width = 2 * np.maximum(abs(low), abs(high)) if self.symmetric else high - low
        scales = (np.maximum(width, 1e-6) / np.float32(top)).astype(self.scale_dtype)
        exact = scales.astype(np.float32)
        zeros = np.full_like(exact, middle) if self.symmetric else np.rint(-low / exact)
        zeros = np.clip(zeros, 0, top).astype(np.uint32)
        scale, zero = (_spread(part, block)[:, :columns] for part in (exact, zeros))
        integers = np.clip(np.rint(weight / scale) + zero, 0, top).astype(np.uint32)
        values = (integers.astype(np.float32) - zero.astype(np.float32)) * scale
        tensors: Tensors = {
            name + "_packed": pack(integers, self.bits),
            name + "_scale": scales,
            name + "_shape": np.array(weight.shape, np.int64),
        }
        if not self.symmetric:
            packed = pack(np.ascontiguousarray(zeros.T), self.bits).T
            tensors[name + "_zero_point"] = np.ascontiguousarray(packed)
        return tensors, values.astype(np.float32)


def quantize_checkpoint(
    weights: Mapping[str, Floats], form: Form
) -> tuple[Tensors, dict[str, Floats]]:
    """The tensors of a quantized checkpoint, and the values that all of its weights stand for."""
    tensors: Tensors = {}
    values: dict[str, Floats] = {}
    for name, weight in weights.items():
        if QUANTIZED.search(name):
            stored, values[name] = form.store(name, weight)
            tensors |= stored
        else:
            tensors[name] = values[name] = weight
    return tensors, values


def pack(integers: NDArray[np.uint32], bits: int) -> NDArray[np.int32]:
    """Unsigned integers [rows, columns] to words [rows, words], low bits first, padded with 0."""
    per_word = 32 // bits
    padding = -integers.shape[1] % per_word
    padded = np.pad(integers, ((0, 0), (0, padding))).reshape(len(integers), -1, per_word)
    shifted = padded << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits))
    return np.bitwise_or.reduce(shifted, axis=-1).view(np.int32)


def _block_maximum(values: Floats, block: tuple[int, int]) -> Floats:
    """The maximum of each block of the last two axes; the last blocks are smaller."""
    rows, columns = values.shape[-2:]
    starts = [range(0, size, step) for size, step in zip((rows, columns), block, strict=True)]
    by_rows = np.maximum.reduceat(values, list(starts[0]), axis=-2)
    return np.maximum.reduceat(by_rows, list(starts[1]), axis=-1)


def _spread(blocks: NDArray[Any], block: tuple[int, int]) -> NDArray[Any]:
    """Each block's value for all of its elements; reaches beyond the last rows and columns."""
    return blocks.repeat(block[0], -2).repeat(block[1], -1)

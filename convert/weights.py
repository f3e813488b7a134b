"""The weights of a checkpoint as float32 numbers, however they are stored.

A weight is one tensor of floats, 8-bit floats and their scales, or packed integers, their scales
and perhaps zeros. Its values are products in float32, rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convert.checkpoint import CheckpointError
from localds import _native

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from convert.checkpoint import Checkpoint, StoredTensor
    from convert.quantization import Packing

    Floats = NDArray[np.float32]
    Read = Callable[[int, int, int], Floats]

FLOATS = ("F64", "F32", "F16", "BF16")
FLOATS_8 = ("F8_E4M3", "F8_E5M2")
SCALE_ENDINGS = ("_scale_inv", "_scale")
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight: a vector, a matrix, or a stack of matrices.

    `names` are the tensors that it is stored in, `source_bytes` their size together.
    `read(matrix, start, stop)` returns rows in float32 [rows, columns]; a vector is one row.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    source_bytes: int
    names: tuple[str, ...]
    read: Read


def open_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Weight:
    """The weight `name`, of a known shape.

    Raises `CheckpointError` if it or what belongs to it is absent, of an unknown type, or of
    another shape.
    """
    packed = checkpoint.tensors.get(name + "_packed")
    if packed is not None and name not in checkpoint.tensors:
        return _open_packed(checkpoint, name, packed, shape)
    tensor = checkpoint.find(name)
    if tensor.shape != shape:
        raise _misfit(tensor, shape)
    if tensor.dtype in FLOATS_8:
        return _open_scaled(checkpoint, tensor)
    return _open_plain(checkpoint, tensor, shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of each matrix."""
    return (shape[-2] if len(shape) > 1 else 1), shape[-1]


def widen(dtype: str, raw: NDArray[np.uint8]) -> Floats:
    """Bytes of floats of type `dtype` to float32, a vector."""
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F64":
        return raw.view(np.float64).astype(np.float32)
    out = np.empty(raw.size // 2, np.float32)
    _native.widen(dtype, raw, out)
    return out


def _open_plain(checkpoint: Checkpoint, tensor: StoredTensor, shape: tuple[int, ...]) -> Weight:
    """A tensor of floats, seen in a `shape` of as many elements."""
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}; "
            f"convert reads {', '.join((*FLOATS, *FLOATS_8))}"
        )
    rows, columns = matrix_shape(shape)

    def read(matrix: int, start: int, stop: int) -> Floats:
        raw = _read_rows(checkpoint, tensor, matrix * rows + start, stop - start, columns)
        return widen(tensor.dtype, raw).reshape(stop - start, columns)

    return Weight(tensor.name, shape, tensor.dtype, tensor.nbytes, (tensor.name,), read)


def _open_scaled(checkpoint: Checkpoint, tensor: StoredTensor) -> Weight:
    """8-bit floats, with a scale for each block of them."""
    scale = _companion(checkpoint, tensor, *(tensor.name + ending for ending in SCALE_ENDINGS))
    rows, columns = matrix_shape(tensor.shape)
    grid, (block_rows, block_columns) = _scale_grid(checkpoint, tensor, scale)
    scales = _open_plain(checkpoint, scale, grid)

    def read(matrix: int, start: int, stop: int) -> Floats:
        raw = _read_rows(checkpoint, tensor, matrix * rows + start, stop - start, columns)
        first, last = start // block_rows, -(-stop // block_rows)
        out = np.empty((stop - start, columns), np.float32)
        _native.scale_fp8(
            tensor.dtype,
            raw.reshape(out.shape),
            scales.read(matrix, first, last),
            block_rows,
            block_columns,
            start - first * block_rows,
            out,
        )
        return out

    size = tensor.nbytes + scale.nbytes
    return Weight(tensor.name, tensor.shape, tensor.dtype, size, (tensor.name, scale.name), read)


def _scale_grid(
    checkpoint: Checkpoint, tensor: StoredTensor, scale: StoredTensor
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The shape of a weight's scales, and the rows and columns that each stands for.

    There is one for a matrix, one for a row, or one for a block; the last blocks are padded.
    """
    (rows, columns), stack = matrix_shape(tensor.shape), tensor.shape[:-2]
    count = math.prod(scale.shape)
    if count == math.prod(stack):
        return (*stack, 1, 1), (rows, columns)
    if count == math.prod(stack) * rows and scale.shape in ((*stack, rows), (*stack, rows, 1)):
        return (*stack, rows, 1), (1, columns)
    blocks = checkpoint.quantization.blocks
    for block in blocks:
        grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
        if scale.shape == grid:
            return grid, block
    known = ", ".join(f"{block[0]} x {block[1]}" for block in blocks) or "none in config.json"
    raise CheckpointError(
        f"{scale.file}: tensor {scale.name!r} has shape {scale.shape}, which is neither one scale "
        f"for {tensor.shape}, nor one for a row, nor one for a block ({known})"
    )


def _open_packed(
    checkpoint: Checkpoint, name: str, packed: StoredTensor, shape: tuple[int, ...]
) -> Weight:
    """Integers packed along the rows, with a scale for each group of them."""
    if len(shape) != 2 or packed.dtype != "I32":
        raise CheckpointError(
            f"{packed.file}: tensor {packed.name!r} has dtype {packed.dtype} for a weight of shape "
            f"{shape}; convert unpacks matrices from I32"
        )
    scale = _companion(checkpoint, packed, name + "_scale")
    parts = [packed, _companion(checkpoint, packed, name + "_shape"), scale]
    packing = _fitting(checkpoint, packed, scale, shape)
    group = packing.group or shape[1]
    scales = _open_plain(checkpoint, scale, (shape[0], -(-shape[1] // group)))
    zero = None
    if not packing.symmetric:
        zero = _companion(checkpoint, packed, name + "_zero_point")
        _check_zeros(zero, scales.shape, packing.bits)
        parts.append(zero)

    def read(_: int, start: int, stop: int) -> Floats:
        raw = _read_rows(checkpoint, packed, start, stop - start, packed.shape[1])
        out = np.empty((stop - start, shape[1]), np.float32)
        _native.unpack_integers(
            packing.bits,
            raw.view(np.uint32).reshape(stop - start, -1),
            scales.read(0, start, stop),
            None if zero is None else _read_zeros(checkpoint, zero, packing.bits, start, stop),
            group,
            out,
        )
        return out

    names = tuple(part.name for part in parts)
    size = sum(part.nbytes for part in parts)
    return Weight(name, shape, f"INT{packing.bits}", size, names, read)


def _fitting(
    checkpoint: Checkpoint, packed: StoredTensor, scale: StoredTensor, shape: tuple[int, ...]
) -> Packing:
    """The packing of config.json that a weight of `shape` has."""
    rows, columns = shape
    for packing in checkpoint.quantization.packings:
        groups = -(-columns // (packing.group or columns))
        words = -(-columns * packing.bits // WORD_BITS)
        if packed.shape == (rows, words) and scale.shape == (rows, groups):
            return packing
    raise CheckpointError(
        f"{packed.file}: tensors {packed.name!r} {packed.shape} and {scale.name!r} {scale.shape} "
        f"do not make a weight of shape {shape} in the way that config.json's "
        "quantization_config describes"
    )


def _check_zeros(zero: StoredTensor, scales: tuple[int, ...], bits: int) -> None:
    wanted = (-(-scales[0] * bits // WORD_BITS), scales[1])
    if zero.dtype != "I32" or zero.shape != wanted:
        raise CheckpointError(
            f"{zero.file}: tensor {zero.name!r} is {zero.dtype} {zero.shape}; the zeros for scales "
            f"of shape {scales} would be I32 {wanted}"
        )


def _read_zeros(
    checkpoint: Checkpoint, zero: StoredTensor, bits: int, start: int, stop: int
) -> NDArray[np.uint8]:
    """Zeros of rows start to stop, uint8 [rows, groups]. They are packed down the columns."""
    per_word, groups = WORD_BITS // bits, zero.shape[1]
    first, last = start // per_word, -(-stop // per_word)
    words = _read_rows(checkpoint, zero, first, last - first, groups).view(np.uint32)
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)[None, :, None]
    zeros = (words.reshape(-1, 1, groups) >> shifts & (2**bits - 1)).astype(np.uint8)
    begin = start - first * per_word
    return np.ascontiguousarray(zeros.reshape(-1, groups)[begin : begin + stop - start])


def _read_rows(
    checkpoint: Checkpoint, tensor: StoredTensor, first: int, rows: int, columns: int
) -> NDArray[np.uint8]:
    """The bytes of rows of a tensor whose rows are `columns` elements long."""
    row_bytes = tensor.nbytes // max(1, math.prod(tensor.shape) // columns)
    return checkpoint.read_bytes(tensor, first * row_bytes, rows * row_bytes)


def _companion(checkpoint: Checkpoint, tensor: StoredTensor, *names: str) -> StoredTensor:
    for name in names:
        if name in checkpoint.tensors:
            return checkpoint.tensors[name]
    raise CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} is quantized, but {' or '.join(names)} is not in "
        "the checkpoint; without it the values are unknown, so download the checkpoint again"
    )


def _misfit(tensor: StoredTensor, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but config.json asks for "
        f"{shape}; the model is not what config.json says it is"
    )

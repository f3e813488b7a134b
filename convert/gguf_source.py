"""An existing GGUF file as a source, to be quantized anew."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from convert.config import CheckpointError
from convert.files import fits_in_memory, read_bytes
from convert.metadata import ARCHITECTURES
from convert.source import Source, Target
from convert.weights import matrix_shape, widen
from localds import _native
from localds.gguf import GGMLType, GGUFError, GGUFFile
from localds.ops.tensors import COMPUTED

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from convert.source import Value
    from localds.gguf import Tensor

FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
FAITHFUL = (*FLOATS, GGMLType.Q8_0)
"""Types that a file is quantized from without asking; others have lost too much already."""
LOSSY = tuple(kind for kind in COMPUTED if kind not in FAITHFUL)

SIZED: dict[str, type[np.generic]] = {
    "u8": np.uint8,
    "i8": np.int8,
    "u16": np.uint16,
    "i16": np.int16,
    "i32": np.int32,
    "u64": np.uint64,
    "i64": np.int64,
    "f64": np.float64,
}
"""Scalars that neither int (u32) nor float (f32) stands for."""

FILE_TYPE = "general.file_type"
# Keys that follow from the recipe and from the form of the file.
REPLACED = re.compile(r"general\.file_type$|general\.alignment$|quantize\.|split\.")


def open_gguf(path: Path, *, requantize: bool = False, keep_types: bool = False) -> Source:
    """The model in `path`, of a split one the first part.

    With `requantize`, tensors that are quantized already to fewer than 8 bits are accepted too.
    With `keep_types` so are all that localds computes with, and what is written in the type that it
    has is copied, not rounded again; `general.file_type` stays. Raises `CheckpointError` for a file
    that cannot be read, or that holds something else.
    """
    try:
        gguf = GGUFFile.open(path)
        architecture = gguf.architecture
    except (GGUFError, OSError) as error:
        raise CheckpointError(str(error)) from None
    if architecture not in ARCHITECTURES.values():
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not one that convert knows: "
            f"{', '.join(sorted(set(ARCHITECTURES.values())))}"
        )
    keep = fits_in_memory(gguf.file_bytes)
    targets = [_target(tensor, requantize or keep_types, keep) for tensor in gguf.tensors.values()]
    values = _values(gguf)
    metadata = {key: value for key, value in values.items() if not REPLACED.match(key)}
    if keep_types and FILE_TYPE in values:
        metadata[FILE_TYPE] = values[FILE_TYPE]
    if not keep_types:
        targets = [replace(target, read_raw=None) for target in targets]
    return Source(path, architecture, metadata, targets, [])


def _target(tensor: Tensor, requantize: bool, keep: bool) -> Target:
    if tensor.type not in FAITHFUL and not (requantize and tensor.type in LOSSY):
        remedy = (
            "convert the original checkpoint, or accept the loss with --allow-requantize"
            if tensor.type in LOSSY
            else "convert the original checkpoint"
        )
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} is {tensor.type.name}; convert starts from "
            f"{', '.join(kind.name for kind in FAITHFUL)}, since quantizing what is quantized "
            f"already adds up errors: {remedy}"
        )
    shape = tensor.shape[::-1]
    if len(shape) > 3:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} has shape {shape}; models that convert knows "
            "have no tensors of more than three dimensions"
        )
    rows, columns = matrix_shape(shape)
    row_bytes = columns // tensor.type.block_elements * tensor.type.block_bytes

    def read_raw(matrix: int, start: int, stop: int) -> NDArray[np.uint8]:
        offset = tensor.offset + (matrix * rows + start) * row_bytes
        size = (stop - start) * row_bytes
        raw = read_bytes(tensor.path, offset, size, f"tensor {tensor.name!r}", keep=keep)
        return raw.reshape(stop - start, row_bytes)

    def read(matrix: int, start: int, stop: int) -> NDArray[np.float32]:
        raw = read_raw(matrix, start, stop).reshape(-1)
        if tensor.type in FLOATS:
            return widen(tensor.type.name, raw).reshape(stop - start, columns)
        quantized = _native.Matrix(tensor.type, stop - start, columns, 1, raw)
        return _native.dequantize(quantized).reshape(stop - start, columns)

    return Target(
        tensor.name, shape, tensor.type.name, tensor.nbytes, read, (tensor.name,), read_raw
    )


def _values(gguf: GGUFFile) -> dict[str, Value]:
    """All metadata, with the types that it has in the file."""
    values: dict[str, Value] = {}
    for key, entry in gguf.metadata.entries.items():
        value = gguf.metadata[key]
        sized = SIZED.get(entry.kind)
        values[key] = sized(value) if sized else value
    return values

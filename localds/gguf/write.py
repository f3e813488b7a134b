"""GGUF version 3 files to write: the header, and the place of every tensor before data exist."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from localds.gguf.error import quote
from localds.gguf.types import GGMLType

WritableValue: TypeAlias = (
    bool | int | float | str | bytes | np.generic | Sequence[str | bytes] | NDArray[Any]
)
"""int becomes u32 and float f32; a numpy scalar or array has the GGUF type of its dtype."""

ALIGNMENT = 32
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4

_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_KINDS = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": _U32,
    "int32": 5,
    "float32": _F32,
    "bool": _BOOL,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}
_TENSOR_TYPES = {
    "float32": GGMLType.F32,
    "float16": GGMLType.F16,
    "float64": GGMLType.F64,
    "int8": GGMLType.I8,
    "int16": GGMLType.I16,
    "int32": GGMLType.I32,
    "int64": GGMLType.I64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor. `shape` is in numpy order, slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def row_bytes(self) -> int:
        """Size of one row; raises `ValueError` where a row is not whole blocks of the type."""
        blocks, rest = divmod(self.shape[-1], self.type.block_elements)
        if rest:
            raise ValueError(
                f"write {quote(self.name)}: rows of {self.shape[-1]} elements are not whole "
                f"{self.type.name} blocks of {self.type.block_elements}; choose another type"
            )
        return blocks * self.type.block_bytes

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """A file before its data: `header` is everything in front of them, padding included.

    `offsets` are the positions of the tensors' data from the start of the file, `size` is the size
    of the whole file, all in bytes. What lies between tensors is zero.
    """

    header: bytes
    offsets: tuple[int, ...]
    size: int


def lay_out(metadata: Mapping[str, WritableValue], tensors: Sequence[TensorInfo]) -> Layout:
    """Encode the header of a file and place its tensors in their order, without gaps.

    Data are aligned to `general.alignment` where `metadata` has it, else to 32 bytes. Raises
    `ValueError` for a key, value or tensor that the format cannot express.
    """
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, (int, np.integer)) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(
            f"write GGUF: general.alignment is {alignment!r}; it must be a power of two from 8"
        )
    alignment = int(alignment)
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(_encode(key, key)), _value(key, value)]
    names: set[str] = set()
    position = 0
    starts = []
    for tensor in tensors:
        parts.append(_info(tensor, position, names))
        starts.append(position)
        position += _padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    header = header.ljust(_padded(len(header), alignment), b"\0")
    offsets = tuple(len(header) + start for start in starts)
    return Layout(header, offsets, len(header) + position)


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, WritableValue],
    tensors: Mapping[str, NDArray[Any]],
) -> None:
    """Write a small file whose data are in memory; `path` is replaced once it is complete.

    A tensor has the type of its dtype: a float, or a signed integer. Raises `ValueError` for what
    the format cannot express and `OSError` where the file cannot be written.
    """
    path = Path(path)
    infos = [_array_info(name, data) for name, data in tensors.items()]
    layout = lay_out(metadata, infos)
    with replaced(path) as stream:
        stream.write(layout.header)
        for data, offset in zip(tensors.values(), layout.offsets, strict=True):
            stream.seek(offset)
            stream.write(np.ascontiguousarray(data, data.dtype.newbyteorder("<")).data)
        stream.truncate(layout.size)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is complete, and not before."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) & -alignment


def _array_info(name: str, data: NDArray[Any]) -> TensorInfo:
    if data.dtype.name not in _TENSOR_TYPES:
        raise ValueError(
            f"write {quote(name)}: GGUF has no tensors of dtype {data.dtype}; "
            f"use {', '.join(_TENSOR_TYPES)}"
        )
    return TensorInfo(name, data.shape or (1,), _TENSOR_TYPES[data.dtype.name])


def _info(tensor: TensorInfo, position: int, names: set[str]) -> bytes:
    name = tensor.name.encode()
    if not 0 < len(name) <= MAX_NAME_BYTES:
        raise ValueError(
            f"write {quote(tensor.name)}: a tensor's name has 1 to {MAX_NAME_BYTES} bytes, "
            f"not {len(name)}"
        )
    if tensor.name in names:
        raise ValueError(f"write {quote(tensor.name)}: two tensors have this name")
    names.add(tensor.name)
    if not 0 < len(tensor.shape) <= MAX_DIMENSIONS or min(tensor.shape) < 1:
        raise ValueError(
            f"write {quote(tensor.name)}: shape {tensor.shape} is not 1 to {MAX_DIMENSIONS} "
            "dimensions of at least 1"
        )
    shape = tensor.shape[::-1]
    place = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, position)
    return _string(name) + place


def _value(key: str, value: WritableValue) -> bytes:
    if isinstance(value, np.generic):
        return struct.pack("<I", _kind(key, value.dtype)) + _little(np.asarray(value))
    if isinstance(value, np.ndarray):
        if value.ndim != 1:
            raise _wrong(key, f"an array of shape {value.shape}", "arrays have one dimension")
        kind = _kind(key, value.dtype)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + _little(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise _wrong(key, str(value), "integers are u32; give a numpy scalar for another width")
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<I", _F32) + _little(_float32(key, value))
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", _STRING) + _string(_encode(key, value))
    strings = b"".join(_string(_encode(key, item)) for item in value)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + strings


def _kind(key: str, dtype: np.dtype[Any]) -> int:
    if dtype.name not in _KINDS:
        raise _wrong(key, f"of dtype {dtype}", f"GGUF has {', '.join(_KINDS)}")
    return _KINDS[dtype.name]


def _float32(key: str, value: float) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = np.array(value, np.float32)
    if math.isfinite(value) and not np.isfinite(rounded):
        raise _wrong(key, str(value), "floats are f32; give a numpy scalar for another width")
    return rounded


def _little(values: NDArray[Any]) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _encode(key: str, text: str | bytes) -> bytes:
    """UTF-8, and bytes that the reader kept as lone surrogates as they were."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise _wrong(key, f"of type {type(text).__name__}", "lists hold strings")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise _wrong(key, quote(text), f"which has no UTF-8 form ({error.reason})") from None


def _string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _wrong(key: str, found: str, rule: str) -> ValueError:
    return ValueError(f"write GGUF: key {quote(key)} is {found}; {rule}")

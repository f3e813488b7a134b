"""GGUF files for tests, written with struct from the format's description alone.

It shares no code with the reader, and writes nonsense as readily as sense:

    write(path, {"general.architecture": "llama"}, [tensor("x", [3, 32], np.float32)])
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from localds.gguf import GGUFFile

KINDS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "array": (9, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
"""Kinds of metadata values: id in the file and struct code."""

_NUMPY_KINDS = {
    "uint8": "u8",
    "int8": "i8",
    "uint16": "u16",
    "int16": "i16",
    "uint32": "u32",
    "int32": "i32",
    "float32": "f32",
    "bool": "bool",
    "uint64": "u64",
    "int64": "i64",
    "float64": "f64",
}


@dataclass(frozen=True)
class Typed:
    """A metadata value of a kind that Python's own types do not tell, such as Typed("u16", 3)."""

    kind: str
    value: Any


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write. `offset` None places it after the one before it, as writers do."""

    name: str | bytes
    type: int
    shape: tuple[int, ...]
    data: bytes = field(repr=False)
    offset: int | None = None


def tensor(name: str, array: np.ndarray, type: int | None = None, shape: Any = None) -> TensorSpec:  # noqa: A002
    """A tensor of a float32, float16 or int32 array, or of raw blocks (then with `type`, `shape`).

    `shape` is in GGUF order, and for a plain array the array's shape reversed.
    """
    plain = {"float32": 0, "float16": 1, "int32": 26}
    kind = plain[array.dtype.name] if type is None else type
    order = tuple(reversed(array.shape)) if shape is None else tuple(shape)
    return TensorSpec(name, int(kind), order, np.ascontiguousarray(array).tobytes())


def build(
    metadata: dict[str, Any] | None = None,
    tensors: list[TensorSpec] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    n_tensors: int | None = None,
    n_entries: int | None = None,
) -> bytes:
    """The bytes of a file. An alignment other than 32 is added to the metadata."""
    entries = dict(metadata or {})
    if alignment != 32:
        entries.setdefault("general.alignment", alignment)
    tensors = tensors or []
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(entries) if n_entries is None else n_entries,
    )
    for key, value in entries.items():
        head += string(key) + pack_value(value)
    data = b""
    for spec in tensors:
        offset = len(data) if spec.offset is None else spec.offset
        head += string(spec.name) + struct.pack("<I", len(spec.shape))
        head += struct.pack(f"<{len(spec.shape)}Q", *spec.shape)
        head += struct.pack("<IQ", spec.type, offset)
        data += pad(spec.data, alignment)
    return pad(head, alignment) + data if tensors else head


def write(path: Path, *args: Any, **kwargs: Any) -> Path:
    """Write what `build` makes of the other arguments, and return the path."""
    path.write_bytes(build(*args, **kwargs))
    return path


def write_split(
    folder: Path,
    metadata: dict[str, Any],
    shards: list[list[TensorSpec]],
    *,
    prefix: str = "model",
    **kwargs: Any,
) -> list[Path]:
    """Write a split model, one file for each list of tensors; the first has the model's keys."""
    count = len(shards)
    paths = []
    for number, tensors in enumerate(shards):
        split = {
            "split.no": Typed("u16", number),
            "split.count": Typed("u16", count),
            "split.tensors.count": Typed("i32", sum(map(len, shards))),
        }
        path = folder / f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"
        keys = {**metadata, **split} if number == 0 else split
        paths.append(write(path, keys, tensors, **kwargs))
    return paths


def string(text: str | bytes) -> bytes:
    """A length and the bytes of a string."""
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value: Any) -> bytes:
    """A kind and a value: bool, int (u32, or i64 where it does not fit), float (f32), str or bytes,
    a numpy scalar or array of that kind, a list of one kind, or `Typed`."""
    kind, plain = _kind_of(value)
    if kind != "array":
        return struct.pack("<I", KINDS[kind][0]) + _pack(kind, plain)
    item_kind = _kind_of(plain[0])[0] if len(plain) else "u32"
    items = b"".join(_pack(item_kind, _kind_of(item)[1]) for item in plain)
    return struct.pack("<IIQ", KINDS["array"][0], KINDS[item_kind][0], len(plain)) + items


def pad(raw: bytes, alignment: int) -> bytes:
    """`raw` with zeros up to a multiple of `alignment`."""
    return raw + bytes(-len(raw) % alignment)


def _pack(kind: str, value: Any) -> bytes:
    return string(value) if kind == "string" else struct.pack("<" + KINDS[kind][1], value)


def _kind_of(value: Any) -> tuple[str, Any]:
    if isinstance(value, Typed):
        return value.kind, value.value
    if isinstance(value, np.generic):
        return _NUMPY_KINDS[value.dtype.name], value.item()
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int):
        return ("u32" if 0 <= value < 2**32 else "i64"), value
    if isinstance(value, float):
        return "f32", value
    if isinstance(value, str | bytes):
        return "string", value
    return "array", value


def spoil(path: Path, tensor: str, index: int) -> Path:
    """Make one value of a float32 tensor NaN, which no converter would write."""
    with GGUFFile.open(path) as file:
        offset = file.tensors[tensor].offset + 4 * index
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(struct.pack("<f", math.nan))
    return path

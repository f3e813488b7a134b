"""One pass over one GGUF file: header, metadata, tensor descriptions, checks of the layout.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what is refused besides is
what llama.cpp refuses, so that a file either opens in both or in neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Final

import numpy as np

from localds.gguf.cursor import MAX_LENGTH, Cursor
from localds.gguf.error import quote
from localds.gguf.mapping import map_file
from localds.gguf.metadata import Array, Entry, StringArray
from localds.gguf.sniff import describe
from localds.gguf.tensor import Tensor
from localds.gguf.types import REMOVED, GGMLType

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4
MAX_NAME_BYTES: Final = 63
MAX_ELEMENTS: Final = 2**63 - 1

_SCALARS: Final = {
    0: ("u8", "<B"),
    1: ("i8", "<b"),
    2: ("u16", "<H"),
    3: ("i16", "<h"),
    4: ("u32", "<I"),
    5: ("i32", "<i"),
    6: ("f32", "<f"),
    7: ("bool", "<?"),
    10: ("u64", "<Q"),
    11: ("i64", "<q"),
    12: ("f64", "<d"),
}
"""Value kinds of fixed size: name, and layout in the notation that struct and numpy share."""

_STRUCTS: Final = {kind: Struct(layout) for kind, (_, layout) in _SCALARS.items()}
_TYPES: Final = {int(kind): kind for kind in GGMLType}
_STRING: Final = 8
_ARRAY: Final = 9

_MIN_ENTRY_BYTES: Final = 8 + 1 + 4 + 1
"""The shortest key and value: a key of one byte and a u8."""

_MIN_TENSOR_BYTES: Final = 8 + 1 + 4 + 4 + 8
"""The shortest description of a tensor: a name of one byte and no dimensions."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one file says: a whole model, or one part of a split one."""

    path: Path
    version: int
    entries: dict[str, Entry]
    tensors: dict[str, Tensor]
    size: int


@dataclass(frozen=True, slots=True)
class _Description:
    """A tensor before its data is located. `field_offset` is where its description starts."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    field_offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block_elements * self.type.block_bytes


def open_part(path: Path) -> Part:
    """Map the file `path` and parse it. Raises `GGUFError` for anything that is not valid GGUF."""
    cursor = Cursor(path, map_file(path))
    version = _read_version(cursor)
    n_tensors = cursor.count("tensor count", _MIN_TENSOR_BYTES)
    n_entries = cursor.count("metadata count", _MIN_ENTRY_BYTES)
    entries = _read_entries(cursor, n_entries)
    alignment = _read_alignment(cursor, entries)
    described = _read_descriptions(cursor, n_tensors)
    tensors = _locate(cursor, described, alignment)
    return Part(path, version, entries, tensors, cursor.size)


def _read_version(cursor: Cursor) -> int:
    if cursor.buffer[: len(MAGIC)].tobytes() != MAGIC:
        found = describe(cursor.buffer[:512].tobytes(), cursor.size)
        raise cursor.fail("magic", f"not a GGUF file: {found}")
    cursor.position = len(MAGIC)
    version = cursor.u32("version")
    if version in VERSIONS:
        return version
    if version and version & 0xFFFF == 0:
        problem = (
            "the file has the other byte order (big-endian); fetch the little-endian file, or "
            "convert it with `gguf-convert-endian FILE little`"
        )
    elif version == 1:
        problem = "version 1 of GGUF is too old; fetch a newer file of this model"
    else:
        problem = f"version {version} of GGUF is unknown; this program reads versions 2 and 3"
    raise cursor.fail("version", problem, len(MAGIC))


def _read_entries(cursor: Cursor, count: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for index in range(count):
        offset = cursor.position
        key = cursor.text(f"key {index + 1} of {count}")
        if not key:
            raise cursor.damaged(f"key {index + 1} of {count}", "is empty", offset)
        field = f"key {quote(key)}"
        if key in entries:
            raise cursor.damaged(field, "appears twice", offset)
        entries[key] = _read_entry(cursor, field, offset)
    return entries


def _read_entry(cursor: Cursor, field: str, offset: int) -> Entry:
    kind = cursor.u32(field)
    if kind == _STRING:
        return Entry(cursor.text(field), "string", offset)
    if kind == _ARRAY:
        value, name = _read_array(cursor, field)
        return Entry(value, f"array of {len(value)} {name}", offset)
    if kind not in _SCALARS:
        raise cursor.damaged(field, f"unknown kind of value {kind}", cursor.position - 4)
    layout = _STRUCTS[kind]
    (scalar,) = layout.unpack_from(cursor.buffer, cursor.take(layout.size, field))
    return Entry(scalar, _SCALARS[kind][0], offset)


def _read_array(cursor: Cursor, field: str) -> tuple[Array | StringArray, str]:
    kind = cursor.u32(field)
    if kind == _ARRAY:
        raise cursor.fail(
            field, "an array of arrays, which models do not use; fetch another file of this model"
        )
    if kind != _STRING and kind not in _SCALARS:
        raise cursor.damaged(field, f"unknown kind of array item {kind}", cursor.position - 4)
    item_bytes = 8 if kind == _STRING else _STRUCTS[kind].size
    offset = cursor.position
    count = cursor.count(field, item_bytes)
    if count > MAX_LENGTH:
        raise cursor.damaged(field, f"an array of {count} items", offset)
    if kind == _STRING:
        return StringArray(cursor.skip_strings(count, field), count), "string"
    name, layout = _SCALARS[kind]
    start = cursor.take(count * item_bytes, field)
    if name == "bool":
        return np.frombuffer(cursor.buffer, np.uint8, count, start) != 0, name
    return np.frombuffer(cursor.buffer, layout, count, start), name


def _read_alignment(cursor: Cursor, entries: dict[str, Entry]) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    value = entry.value
    if entry.kind == "u32" and isinstance(value, int) and value >= 8 and value & (value - 1) == 0:
        return value
    shown = value if isinstance(value, int) else entry.kind
    raise cursor.damaged(
        "key 'general.alignment'",
        f"{shown} ({entry.kind}) is not a u32 that is a power of two and at least 8",
        entry.offset,
    )


def _read_descriptions(cursor: Cursor, count: int) -> list[_Description]:
    names: set[str] = set()
    described: list[_Description] = []
    for index in range(count):
        tensor = _read_description(cursor, f"tensor {index + 1} of {count}")
        if tensor.name in names:
            raise cursor.damaged(
                f"tensor {quote(tensor.name)}", "appears twice", tensor.field_offset
            )
        names.add(tensor.name)
        described.append(tensor)
    return described


def _read_description(cursor: Cursor, position: str) -> _Description:
    start = cursor.position
    name = cursor.text(position)
    name_bytes = cursor.position - start - 8
    if not 1 <= name_bytes <= MAX_NAME_BYTES:
        raise cursor.damaged(
            position, f"its name has {name_bytes} bytes, not 1 to {MAX_NAME_BYTES}", start
        )
    field = f"tensor {quote(name)}"
    shape = _read_shape(cursor, field)
    kind = _read_type(cursor, field)
    if shape[0] % kind.block_elements:
        raise cursor.fail(
            field,
            f"rows of {shape[0]} values are not a multiple of {kind.block_elements}, the block of "
            f"{kind.name}; the file is damaged or was converted wrongly",
            start,
        )
    return _Description(name, kind, shape, cursor.u64(field), start)


def _read_shape(cursor: Cursor, field: str) -> tuple[int, ...]:
    start = cursor.position
    dimensions = cursor.u32(field)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.damaged(
            field, f"{dimensions} dimensions, at most {MAX_DIMENSIONS} are possible", start
        )
    shape = tuple(cursor.u64(field) for _ in range(dimensions))
    if max(shape, default=0) > MAX_ELEMENTS or math.prod(shape) > MAX_ELEMENTS:
        raise cursor.damaged(field, f"shape {shape} is impossibly large", start)
    return shape or (1,)


def _read_type(cursor: Cursor, field: str) -> GGMLType:
    start = cursor.position
    number = cursor.u32(field)
    if number in _TYPES:
        return _TYPES[number]
    if number in REMOVED:
        problem = (
            f"type {REMOVED[number]} is no longer part of the format; fetch a newer file of this "
            "model"
        )
    else:
        problem = (
            f"unknown type {number}; the file is damaged or newer than this program: update "
            "localds or fetch another quantization"
        )
    raise cursor.fail(field, problem, start)


def _locate(cursor: Cursor, described: list[_Description], alignment: int) -> dict[str, Tensor]:
    """Check that the tensors lie one after the other inside the file, and make views of them."""
    start = _padded(cursor.position, alignment)
    end = start + _check_order(cursor, described, alignment)
    if described and end > cursor.size:
        first = next(t for t in described if start + t.offset + t.nbytes > cursor.size)
        raise cursor.fail(
            f"tensor {quote(first.name)}",
            f"its data end at {start + first.offset + first.nbytes}, beyond the end of the file: "
            f"it has {cursor.size} bytes of {end}; download incomplete? Fetch it again",
            first.field_offset,
        )
    data = np.frombuffer(cursor.buffer, np.uint8)
    tensors: dict[str, Tensor] = {}
    for tensor in described:
        at = start + tensor.offset
        view = data[at : at + tensor.nbytes]
        tensors[tensor.name] = Tensor(tensor.name, tensor.type, tensor.shape, view, at, cursor.path)
    return tensors


def _check_order(cursor: Cursor, described: list[_Description], alignment: int) -> int:
    """Bytes of all tensors; each must begin where the one before it ends, padded."""
    begin = end = 0
    for tensor in described:
        if tensor.offset != begin:
            raise cursor.damaged(
                f"tensor {quote(tensor.name)}",
                f"its data begin at {tensor.offset} of the data section where {begin} is expected, "
                "so tensors overlap or leave a gap",
                tensor.field_offset,
            )
        end = begin + tensor.nbytes
        begin = _padded(end, alignment)
    return end


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

"""Headers of safetensors files, checked before anything is read.

The layout: 8 bytes little-endian header length, a JSON header that gives each tensor's dtype, shape
and byte range, then the data, in which the ranges follow one another without gap or overlap.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.config import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

BYTES = {
    dtype: width
    for width, dtypes in {
        8: "F64 I64 U64",
        4: "F32 I32 U32",
        2: "F16 BF16 I16 U16",
        1: "F8_E4M3 F8_E5M2 F8_E8M0 I8 U8 BOOL",
    }.items()
    for dtype in dtypes.split()
}
"""Widths of the known element types; tensors of others pass as long as nobody reads them."""

# The limit of the format's own library; the header of a 1000-billion-parameter shard takes 1 MB.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies. `shape` is in the checkpoint's order (rows first); bytes in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.stop - self.start


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their data.

    Raises `CheckpointError` for a header that is damaged or does not describe the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little") if len(prefix) == 8 else size
        if length > size - 8:
            raise CheckpointError(
                f"{file}: {size} bytes do not hold its header; it is truncated, download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: damaged header (it claims {length} bytes; {MAX_HEADER_BYTES} are allowed)"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = [_stored(name, entry, file, 8 + length) for name, entry in header.items()]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged header ({_describe(error)})") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_ranges(tensors, file, 8 + length, size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return values


def _stored(name: str, entry: dict[str, Any], file: Path, base: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"{name!r} has offsets [{start}, {stop}] and shape {shape}")
    if not isinstance(dtype, str):
        raise ValueError(f"{name!r} has dtype {dtype!r}")
    if dtype in BYTES and stop - start != BYTES[dtype] * math.prod(shape):
        raise ValueError(f"{name!r}: {dtype} {shape} does not fill bytes {start} to {stop}")
    return StoredTensor(name, dtype, tuple(shape), file, base + start, base + stop)


def _check_ranges(tensors: list[StoredTensor], file: Path, base: int, size: int) -> None:
    end = base
    for tensor in tensors:
        if tensor.stop > size:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r} ends at byte {tensor.stop}, but the file has "
                f"{size}; it is truncated, download it again"
            )
        if tensor.start != end or tensor.stop < tensor.start:
            raise CheckpointError(
                f"{file}: damaged header (tensor {tensor.name!r} lies at bytes {tensor.start} to "
                f"{tensor.stop}, where {end} should be the first)"
            )
        end = tensor.stop
    if end != size:
        raise CheckpointError(
            f"{file}: damaged header ({size - end} bytes after the last tensor belong to none)"
        )


def _describe(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)

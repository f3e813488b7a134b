"""Small safetensors files: headers that are checked before anything is read, and writing.

The layout: 8 bytes little-endian header length, a JSON header that gives each tensor's dtype, shape
and byte range, then the data.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from localds.adapters.adapter import AdapterError
from localds.gguf.write import replaced

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from localds.adapters.adapter import Floats

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# A model of 61 layers with 256 experts each, adapted one by one, takes 30 MB.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor of floats lies in a file: bytes `start` to `stop`."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> Floats:
        """Its values. Raises `AdapterError` for a file that was cut short meanwhile."""
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
        count = math.prod(self.shape)
        values = np.fromfile(self.path, kinds[self.dtype], count, offset=self.start)
        if values.size != count:
            raise AdapterError(f"{self.path}: tensor {self.name!r} ends early; copy the file again")
        if self.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return values.astype(np.float32).reshape(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file.

    Raises `AdapterError` for a header that is damaged, and for tensors that hold no floats.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise AdapterError(
                f"{path}: {size} bytes are no safetensors file; it was cut short or damaged, copy "
                "it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise TypeError("its metadata are no object")
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path}: damaged header ({error})") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda stored: (stored.start, stored.stop)):
        if tensor.start != end or tensor.stop < tensor.start:
            raise AdapterError(f"{path}: damaged header (the place of tensor {tensor.name!r})")
        end = tensor.stop
    if end != size:
        raise AdapterError(
            f"{path}: its tensors end at byte {end}, and it has {size}; it was cut short or "
            "damaged, copy it again"
        )
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], base: int) -> Stored:
    (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if dtype not in _WIDTHS:
        raise ValueError(f"{name!r} is {dtype}; adapters are {', '.join(_WIDTHS)}")
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"{name!r} has offsets [{start}, {stop}] and shape {shape}")
    if stop - start != _WIDTHS[dtype] * math.prod(shape):
        raise ValueError(f"{name!r}: {dtype} {shape} does not fill bytes {start} to {stop}")
    return Stored(path, name, dtype, tuple(shape), base + start, base + stop)


def write_safetensors(path: Path, tensors: Mapping[str, Floats]) -> None:
    """Write float32 tensors; `path` is replaced once the file is complete."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [end, end + array.size * 4],
        }
        end += array.size * 4
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with replaced(path) as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for array in tensors.values():
            stream.write(np.ascontiguousarray(array, "<f4").data)

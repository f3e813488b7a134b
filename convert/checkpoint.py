"""Published checkpoints: a folder with config.json and safetensors files, read lazily.

The safetensors layout: 8 bytes little-endian header length, a JSON header that gives each tensor's
dtype, shape and byte range, then the data. Tensors are views into a memory map until they are read.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Numpy dtypes of the element types that `Checkpoint.read` understands; BF16 as its bits."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of a kind that convert does not know."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies. `shape` is in the checkpoint's order (rows first); bytes in `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


class Checkpoint:
    """A checkpoint folder: its config and its tensors."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`. Raises `CheckpointError` for missing or damaged files."""
        self.folder = folder
        self.config = Config(read_json(folder / "config.json"))
        self.tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in _weight_files(folder):
            for name, tensor in _read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is also in {self.tensors[name].file.name}"
                    )
                self.tensors[name] = tensor

    def read(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32, in the checkpoint's shape.

        Raises `CheckpointError` if there is none of that name or its dtype is not floating point.
        """
        tensor = self.find(name)
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; "
                f"convert reads {', '.join(DTYPES)}"
            )
        if tensor.file not in self._maps:
            with tensor.file.open("rb") as stream:
                self._maps[tensor.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        raw: NDArray[Any] = np.frombuffer(
            self._maps[tensor.file],
            DTYPES[tensor.dtype],
            math.prod(tensor.shape),
            tensor.start,
        ).reshape(tensor.shape)
        if tensor.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    def find(self, name: str) -> StoredTensor:
        """Where `name` lies. Raises `CheckpointError` if the checkpoint has no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: no tensor {name!r} in the checkpoint; "
                "check that all of its safetensors files are there"
            )
        return self.tensors[name]


class Config:
    """The values of config.json, with typed access. A JSON null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer. Raises `CheckpointError` if it is missing without default, or not one."""
        return int(self._get(key, default, int))

    def integers(self, key: str) -> list[int]:
        """A list of integers; a single one counts as a list."""
        value = self._get(key, None, int, list)
        return [int(item) for item in (value if isinstance(value, list) else [value])]

    def number(self, key: str, default: float | None = None) -> float:
        """A float (or an integer that stands for one)."""
        return float(self._get(key, default, int, float))

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """A boolean."""
        return bool(self._get(key, default, bool))

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return str(self._get(key, default, str))

    def strings(self, key: str) -> list[str]:
        """A list of strings."""
        values: list[Any] = self._get(key, None, list)
        return [str(value) for value in values]

    def section(self, key: str) -> Config:
        """A nested object; an absent one is empty."""
        return Config(self._get(key, {}, dict), f"{self._where}: {key}")

    def _get(self, key: str, default: object, *types: type) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where}: {key} is missing; convert needs it")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise CheckpointError(f"{self._where}: {key} is {value!r}, expected {wanted}")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError` if the file is missing or holds no object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a whole checkpoint?") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: those of the index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{folder}: neither model.safetensors nor model.safetensors.index.json is there"
            )
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is missing")
    files = [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: listed in the index, but not there; download it again")
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{file}: {size} bytes do not hold its header; it is truncated")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _stored(entry, file, 8 + length) for name, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged header ({error})") from None
    for name, tensor in tensors.items():
        if tensor.stop > size:
            raise CheckpointError(
                f"{file}: tensor {name!r} ends at byte {tensor.stop}, but the file has {size}; "
                "it is truncated, download it again"
            )
    return tensors


def _stored(entry: dict[str, Any], file: Path, base: int) -> StoredTensor:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(extent) for extent in entry["shape"])
    dtype = str(entry["dtype"])
    if start < 0 or any(extent < 0 for extent in shape):
        raise ValueError(f"negative offset or extent: {entry}")
    width = np.dtype(DTYPES[dtype]).itemsize if dtype in DTYPES else None
    if width is not None and stop - start != width * math.prod(shape):
        raise ValueError(f"{dtype} {shape} does not fill bytes {start} to {stop}")
    return StoredTensor(dtype, shape, file, base + start, base + stop)

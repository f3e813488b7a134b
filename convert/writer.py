"""GGUF output, through the `gguf` package."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, BinaryIO, cast

import gguf
import numpy as np

from convert.checkpoint import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from convert.source import Target, Value


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    targets: list[Target],
) -> None:
    """Write a GGUF file with all tensors in float32, holding one block of rows at a time."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for target in targets:
        size = 4 * math.prod(target.shape)
        writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    _write_data(writer, targets)
    writer.close()


def _write_data(writer: gguf.GGUFWriter, targets: list[Target]) -> None:
    stream = cast("list[BinaryIO]", writer.fout)[0]
    writer.write_padding(stream, stream.tell())
    for target in targets:
        written = 0
        for block in target.blocks():
            stream.write(np.ascontiguousarray(block.data).data)
            written += block.data.nbytes
        if written != 4 * math.prod(target.shape):
            raise CheckpointError(
                f"write {target.name}: {written} bytes do not make the shape {target.shape}"
            )
        writer.write_padding(stream, written)


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, np.int32):
        writer.add_int32(key, int(value))
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        writer.add_array(key, value.tolist())
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"write {key}: {type(value).__name__} values come from GGUF files only")

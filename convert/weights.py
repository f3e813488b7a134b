"""The weights of a checkpoint as float32 numbers, however they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convert.checkpoint import DTYPES, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from convert.checkpoint import Checkpoint

    Read = Callable[[int, int, int], NDArray[np.float32]]

FLOATS = ("F64", "F32", "F16", "BF16")


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


def open_weight(checkpoint: Checkpoint, name: str) -> Weight:
    """The weight `name`. Raises `CheckpointError` if it is absent or of an unknown form."""
    tensor = checkpoint.find(name)
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; "
            f"convert reads {', '.join(FLOATS)}"
        )
    rows, columns = matrix_shape(tensor.shape)
    row_bytes = tensor.nbytes // max(1, math.prod(tensor.shape[:-1]))

    def read(matrix: int, start: int, stop: int) -> NDArray[np.float32]:
        offset = (matrix * rows + start) * row_bytes
        raw = checkpoint.read_bytes(tensor, offset, (stop - start) * row_bytes)
        return widen(tensor.dtype, raw).reshape(stop - start, columns)

    return Weight(name, tensor.shape, tensor.dtype, tensor.nbytes, (name,), read)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of each matrix."""
    return (shape[-2] if len(shape) > 1 else 1), shape[-1]


def widen(dtype: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes of floats to float32."""
    values = raw.view(DTYPES[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)

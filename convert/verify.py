"""Is a written file what the source says? Every tensor is read back and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convert.config import CheckpointError
from localds import _native
from localds.gguf import GGMLType, GGUFFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from convert.source import Block, Source, Target
    from localds.gguf import Tensor

# Largest plausible root of the relative squared error: twice what normal weights show; F16 and BF16
# round, F32 keeps. Beyond it something other than rounding happened.
BOUNDS = {
    GGMLType.F32: 0.0,
    GGMLType.F16: 1e-3,
    GGMLType.BF16: 4e-3,
    GGMLType.Q8_0: 0.02,
    GGMLType.Q6_K: 0.05,
    GGMLType.Q5_K: 0.1,
    GGMLType.Q5_1: 0.1,
    GGMLType.Q5_0: 0.12,
    GGMLType.Q4_K: 0.2,
    GGMLType.Q4_1: 0.2,
    GGMLType.Q4_0: 0.22,
    GGMLType.IQ4_NL: 0.2,
    GGMLType.IQ4_XS: 0.2,
    GGMLType.MXFP4: 0.28,
    GGMLType.Q3_K: 0.35,
    GGMLType.Q2_K: 0.6,
}

ROW_BOUND = 0.9
"""The same for a single row of whatever type: of a row of zeros or of other values it is 1 or more.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One tensor: the root of its relative squared error, and whether its type explains it.

    `row_error` is that of its worst row; a row that is small beside its neighbours counts as a
    tenth of them.
    """

    name: str
    kind: GGMLType
    error: float
    row_error: float
    source_bytes: int

    @property
    def plausible(self) -> bool:
        """Whether the errors are no larger than rounding to the type makes them."""
        return self.error <= BOUNDS.get(self.kind, 0.0) and self.row_error <= ROW_BOUND


def verify(source: Source, path: Path) -> Iterator[Check]:
    """Compare each tensor of the file at `path` with the source, one after another.

    Raises `GGUFError` for a file that cannot be read and `CheckpointError` for one that lacks a
    tensor or has another shape.
    """
    with GGUFFile.open(path) as file:
        names = {target.name for target in source.targets}
        extra = [name for name in file.tensors if name not in names]
        if extra:
            raise CheckpointError(f"{path}: {extra[0]} is not a tensor of {source.path}")
        for target in source.targets:
            tensor = file.tensors.get(target.name)
            if tensor is None or tensor.shape[::-1] != target.shape:
                found = "lacks it" if tensor is None else f"has {tensor.shape[::-1]}"
                raise CheckpointError(
                    f"{path}: {target.name} should be {target.shape}, but the file {found}"
                )
            yield Check(target.name, tensor.type, *_errors(target, tensor), target.source_bytes)


def _errors(target: Target, tensor: Tensor) -> tuple[float, float]:
    """The relative error of the whole tensor, and of its worst row."""
    difference = total = worst = 0.0
    for block in target.blocks():
        stored = _stored(tensor, target, block)
        # NaN and infinities in the file make the sum so, and fail every bound.
        wrong = np.square(block.data - stored, dtype=np.float64).sum(axis=1)
        squares = np.square(block.data, dtype=np.float64).sum(axis=1)
        difference += float(wrong.sum())
        total += float(squares.sum())
        smallest = max(float(squares.mean()) / 100, 1e-300)
        worst = max(worst, float((wrong / np.maximum(squares, smallest)).max()))
    if not math.isfinite(difference):
        return math.inf, math.inf
    if total == 0:
        return (math.inf, math.inf) if difference else (0.0, 0.0)
    return math.sqrt(difference / total), math.sqrt(worst)


def _stored(tensor: Tensor, target: Target, block: Block) -> NDArray[np.float32]:
    rows, columns = len(block.data), target.columns
    row_bytes = columns // tensor.type.block_elements * tensor.type.block_bytes
    start = block.first_row * row_bytes
    data = tensor.data[start : start + rows * row_bytes]
    values: NDArray[np.float32] = _native.dequantize(
        _native.Matrix(tensor.type, rows, columns, 1, data)
    )[0]
    return values

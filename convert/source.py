"""What convert reads from: a model's metadata and its tensors, wherever they come from.

Data is read in blocks of rows, in any order, so that no tensor ever has to fit in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Value = bool | int | float | str | bytes | list[str] | np.generic | NDArray[np.generic]
    """A metadata value; its type is the GGUF type: int is u32, float f32, and numpy's scalars and
    arrays keep their own. Bytes that are not UTF-8 are lone surrogates in a str (PEP 383)."""

BLOCK_BYTES = 32 << 20
"""About how much float32 data a block holds."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one tensor in float32 [rows, columns], all of them of one matrix.

    `first_row` counts over all matrices of the tensor.
    """

    first_row: int
    data: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Rows of one tensor as they lie in the source, uint8 [rows, row_bytes]."""

    first_row: int
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the GGUF file to write.

    `shape` is in numpy order, slowest first: GGUF's reversed. A tensor of three dimensions is a
    stack of matrices (experts or heads). `stored` names the type of the data in the source, such
    as BF16, F8_E4M3 or Q8_0, `source_bytes` is its size there.
    `read(matrix, start, stop)` returns rows start to stop of a matrix in float32 [rows, columns].
    `origins` are the names of the tensors it comes from: one for each matrix, or one for all.
    With `read_raw`, rows can be had as they lie in the source, uint8 [rows, row_bytes]: a tensor
    that keeps its type need not be rounded again.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    source_bytes: int
    read: Callable[[int, int, int], NDArray[np.float32]]
    origins: tuple[str, ...] = ()
    read_raw: Callable[[int, int, int], NDArray[np.uint8]] | None = None

    def origin(self, matrix: int) -> str:
        """The source's name of the tensor that holds a matrix, for messages."""
        if not self.origins:
            return self.name
        return self.origins[matrix if len(self.origins) > 1 else 0]

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return self.shape[-1]

    @property
    def matrices(self) -> int:
        """How many matrices the tensor stacks; 1 unless it has three dimensions."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def rows(self) -> int:
        """Rows in a matrix; a vector is one row."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def elements(self) -> int:
        """Elements in all."""
        return math.prod(self.shape)

    def blocks(self) -> Iterator[Block]:
        """The data in order."""
        for matrix, start, stop in self._ranges():
            yield Block(matrix * self.rows + start, self.read(matrix, start, stop))

    def raw_blocks(self) -> Iterator[RawBlock]:
        """The data in order, as they lie in the source; none without `read_raw`."""
        read = self.read_raw
        if read is None:
            return
        for matrix, start, stop in self._ranges():
            yield RawBlock(matrix * self.rows + start, read(matrix, start, stop))

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        step = max(1, BLOCK_BYTES // (4 * self.columns))
        for matrix in range(self.matrices):
            for start in range(0, self.rows, step):
                yield matrix, start, min(start + step, self.rows)


@dataclass(frozen=True, slots=True)
class Source:
    """A model to convert.

    `metadata` holds every key of the file to write, the tokenizer's included, but those that follow
    from the recipe (general.file_type, quantize.*) and from the form of the file (split.*).
    `notes` are lines that the user should see, such as what is left out.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Value]
    targets: list[Target]
    notes: list[str]

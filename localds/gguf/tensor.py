"""A tensor of a file: what the file says of it, and a view of its bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localds.gguf.types import GGMLType


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor as it lies in a file; compared by identity.

    `shape` is in GGUF order, the fastest dimension first; a scalar has shape (1,). `data` is uint8
    [nbytes], a read-only view into the memory map, which stays as long as any view of it lives.
    `offset` is the position of the data in the file `path`, in bytes, a multiple of 8.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    offset: int
    path: Path

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.data.nbytes

    @property
    def n_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

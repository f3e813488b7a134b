"""How GGUF tensors are made of a checkpoint's weights: copied, sliced, stacked, reordered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convert.source import Target
from convert.weights import open_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convert.checkpoint import Checkpoint
    from convert.weights import Read, Weight

    Floats = NDArray[np.float32]


class Planner:
    """Collects targets and remembers which tensors of the checkpoint they take.

    `prefix` stands before all names of the checkpoint. Every method raises `CheckpointError` for a
    tensor that is missing or has another shape than the one given.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str = "") -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.targets: list[Target] = []
        self.used: set[str] = set()

    def has(self, source: str) -> bool:
        """Whether the checkpoint has a weight of that name."""
        name = self.prefix + source
        return name in self.checkpoint.tensors or name + "_packed" in self.checkpoint.tensors

    def copy(self, source: str, name: str, shape: tuple[int, ...]) -> None:
        """A tensor as it is."""
        weight = self._open(source, shape)
        self._add(name, shape, [weight], weight.source_bytes, weight.read)

    def stack(self, pattern: str, name: str, shape: tuple[int, int, int]) -> None:
        """One tensor [count, rows, columns] from the matrices of `count` experts."""
        parts = [self._open(pattern.format(index), shape[1:]) for index in range(shape[0])]

        def read(matrix: int, start: int, stop: int) -> Floats:
            return parts[matrix].read(0, start, stop)

        self._add(name, shape, parts, sum(part.source_bytes for part in parts), read)

    def split(self, source: str, names: tuple[str, str], shape: tuple[int, int, int]) -> None:
        """Two tensors of equal `shape`, whose rows follow one another in each source matrix."""
        count, rows, columns = shape
        weight = self._open(source, (count, 2 * rows, columns))
        for first, name in zip((0, rows), names, strict=True):

            def read(matrix: int, start: int, stop: int, first: int = first) -> Floats:
                return weight.read(matrix, first + start, first + stop)

            self._add(name, shape, [weight], weight.source_bytes // 2, read)

    def interleave(self, source: str, name: str, heads: int, shape: tuple[int, int]) -> None:
        """A projection whose heads are rotated in halves, reordered for rotation in pairs."""
        weight = self._open(source, shape)
        width = shape[0] // heads

        def read(matrix: int, start: int, stop: int) -> Floats:
            first, last = start // width, -(-stop // width)
            rows = interleave(weight.read(matrix, first * width, last * width), last - first)
            return rows[start - first * width : stop - first * width]

        self._add(name, shape, [weight], weight.source_bytes, read)

    def latent_halves(
        self, source: str, names: tuple[str, str], heads: int, key: int, value: int, rank: int
    ) -> None:
        """The two halves of kv_b_proj [heads * (key + value), rank], for absorbed attention.

        The keys' maps a query head into the latent space: [heads, rank, key]. The values' is
        [heads, value, rank].
        """
        height = key + value
        weight = self._open(source, (heads * height, rank))

        def read_keys(head: int, start: int, stop: int) -> Floats:
            rows = weight.read(0, head * height, head * height + key)
            return np.ascontiguousarray(rows.T[start:stop])

        def read_values(head: int, start: int, stop: int) -> Floats:
            first = head * height + key
            return weight.read(0, first + start, first + stop)

        key_bytes = weight.source_bytes * key // height
        value_bytes = weight.source_bytes - key_bytes
        self._add(names[0], (heads, rank, key), [weight], key_bytes, read_keys)
        self._add(names[1], (heads, value, rank), [weight], value_bytes, read_values)

    def _open(self, source: str, shape: tuple[int, ...]) -> Weight:
        return open_weight(self.checkpoint, self.prefix + source, shape)

    def _add(
        self, name: str, shape: tuple[int, ...], weights: list[Weight], size: int, read: Read
    ) -> None:
        kinds = sorted({weight.stored for weight in weights})
        origins = tuple(weight.name for weight in weights)
        self.targets.append(Target(name, shape, "+".join(kinds), size, read, origins))
        for weight in weights:
            self.used.update(weight.names)


def interleave(rows: Floats, heads: int) -> Floats:
    """Reorder each head's rows so that the pair (j, j + d/2) of rotary embedding is adjacent.

    [heads * d, columns]; new row 2j is old row j, new row 2j + 1 is old row j + d/2.
    """
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)

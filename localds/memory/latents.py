"""The latent cache: one row per token and layer, never expanded keys and values.

A row of multi-head latent attention holds the kv_lora_rank values of the compressed latent and the
rotated position key; a row of grouped-query attention all keys, then all values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds.gguf import GGMLType

if TYPE_CHECKING:
    from numpy.typing import NDArray

CACHE_TYPES = {"f32": GGMLType.F32, "f16": GGMLType.F16, "q8_0": GGMLType.Q8_0}

SCORE_BYTES = 256 << 20
"""What the scores of queries with keys take at most that attention on a GPU computes at once."""
SPAN_BYTES = 16 << 20
"""What rows take at most that attention on a GPU converts at once."""
QUERIES = 8
"""A GPU attends with a multiple of so many queries at once, where there are as many."""


class ContextError(ValueError):
    """The tokens do not fit in the context."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's rows: `data` uint8 [capacity, row_bytes] holds `width` elements a row."""

    data: NDArray[np.uint8]
    type: GGMLType
    width: int


def row_bytes(cache_type: str, width: int) -> int:
    """Bytes of one row of `width` elements.

    Raises `ValueError` for an unknown cache type or a q8_0 row that is not a multiple of 32 wide.
    """
    if cache_type not in CACHE_TYPES:
        raise ValueError(f"cache type {cache_type!r} is unknown; choose {', '.join(CACHE_TYPES)}")
    if cache_type == "q8_0":
        if width % 32:
            raise ValueError(
                f"a q8_0 cache needs rows of a multiple of 32 elements, this model's have {width}; "
                "use f16"
            )
        return width // 32 * 34
    return width * (2 if cache_type == "f16" else 4)


class LatentCache:
    """Rows of all layers for up to `capacity` tokens.

    The memory is reserved at once but taken from the system only as rows are written, so a large
    capacity costs nothing until it is used.
    """

    def __init__(self, layers: int, width: int, capacity: int, cache_type: str = "f16") -> None:
        if capacity < 1:
            raise ContextError(f"context of {capacity} tokens: it must be at least 1")
        self.capacity = capacity
        self.length = 0
        self.row_bytes = row_bytes(cache_type, width)
        try:
            buffer = np.empty((layers, capacity, self.row_bytes), np.uint8)
        except MemoryError:
            raise ContextError(
                f"a {cache_type} cache for {capacity} tokens does not fit in memory; "
                "choose a smaller context"
            ) from None
        kind = CACHE_TYPES[cache_type]
        self.layers = [LayerCache(rows, kind, width) for rows in buffer]

    @property
    def layout(self) -> str:
        """What the bytes of a row mean, such as "F16 27 x 576"."""
        first = self.layers[0]
        return f"{first.type.name} {len(self.layers)} x {first.width}"

    def rows(self, start: int, stop: int) -> list[memoryview]:
        """Each layer's bytes of the rows from `start` to before `stop`, to read or to write."""
        return [layer.data[start:stop].reshape(-1).data for layer in self.layers]

    def reserve(self, n_tokens: int) -> None:
        """Check that `n_tokens` more fit; raises `ContextError` where they do not."""
        if self.length + n_tokens > self.capacity:
            raise ContextError(
                f"{self.length + n_tokens} tokens do not fit in the context of {self.capacity}; "
                "choose a larger context or shorten the conversation"
            )

    def extend(self, n_tokens: int) -> None:
        """Count `n_tokens` rows, written by every layer, as filled."""
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length


def attention_blocks(
    heads: int, n: int, length: int, width: int, itemsize: int, *, converted: bool
) -> tuple[int, int]:
    """Of `n` queries and `length` keys, how many of each a GPU attends to and with at once.

    Scores are of `itemsize` bytes, and so are the elements of the rows, `width` elements wide, if
    they are `converted` from another type.
    """
    keys = SCORE_BYTES // (heads * min(n, QUERIES) * itemsize)
    if converted:
        keys = min(keys, SPAN_BYTES // (width * itemsize))
    keys = min(max(keys, 1), length)
    queries = SCORE_BYTES // (heads * keys * itemsize) // QUERIES * QUERIES
    return min(max(queries, QUERIES), n), keys


def attention_scratch(heads: int, width: int, chunk: int, context: int, cache_type: str) -> int:
    """Bytes that attention on a GPU takes at most for a chunk, beside weights and cache.

    `heads` share rows of `width` elements, or have their own part of them, which takes less.
    """
    return max(_scratch(heads, width, n, context, cache_type) for n in (1, chunk))


def _scratch(heads: int, width: int, n: int, context: int, cache_type: str) -> int:
    itemsize = 4 if n == 1 or cache_type == "f32" else 2
    converted = cache_type == "q8_0" or (cache_type == "f16" and n == 1)
    queries, keys = attention_blocks(heads, n, context, width, itemsize, converted=converted)
    # Scores are there twice: as they come, and what follows from them.
    scores = 2 * heads * queries * keys * itemsize
    # Splitting rows into keys and values copies them; converting takes steps more, and a token's
    # graph, which waits for nothing, runs ahead by a span.
    rows = keys * width * itemsize * (6 if converted else 1)
    return scores + rows + 2 * heads * n * width * 4

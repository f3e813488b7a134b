"""Products with matrices that were written out in float16, of x in float32."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from collections.abc import Callable


def product(x: mx.array, weight: mx.array) -> mx.array:
    """X [..., n, columns] times the transpose of weight float16 [..., rows, columns]."""
    return _in_float16(x, lambda scaled: scaled @ weight.swapaxes(-1, -2))


def chosen_product(x: mx.array, weight: mx.array, ids: mx.array) -> mx.array:
    """Each row of x [m, columns] times the matrix of a stack in ids [m], ascending: [m, rows]."""

    def gathered(scaled: mx.array) -> mx.array:
        # With an axis put in by indexing, MLX takes the rows of x from the wrong places.
        rows = mx.contiguous(scaled).reshape(len(ids), 1, -1)
        transposed = weight.swapaxes(-1, -2)
        return mx.gather_mm(rows, transposed, rhs_indices=ids, sorted_indices=True)[:, 0]

    return _in_float16(x, gathered)


def _in_float16(x: mx.array, multiply: Callable[[mx.array], mx.array]) -> mx.array:
    """What `multiply` makes of x in float16, each row's largest value made 1 meanwhile."""
    size = mx.maximum(mx.abs(x).max(axis=-1, keepdims=True), 1e-30)
    return multiply((x / size).astype(mx.float16)).astype(mx.float32) * size


@cache
def counted(matrices: int, n: int) -> mx.array:
    """Ids uint32 [matrices * n]: n times the first, n times the second, and so on.

    Made once, so that no step has to make them again.
    """
    ids = mx.repeat(mx.arange(matrices, dtype=mx.uint32), n)
    mx.eval(ids)
    return ids

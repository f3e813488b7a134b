"""Small arrays that kernels are given, made once, so that no step has to make them again."""

from __future__ import annotations

from functools import cache

import mlx.core as mx


@cache
def counted(matrices: int, n: int) -> mx.array:
    """Ids uint32 [matrices * n]: n times the first, n times the second, and so on."""
    return _made(mx.repeat(mx.arange(matrices, dtype=mx.uint32), n))


@cache
def zeros(n: int) -> mx.array:
    """Ids uint32 [n, 1] of the first matrix."""
    return _made(mx.zeros((n, 1), mx.uint32))


@cache
def ones(n: int) -> mx.array:
    """Weights float32 [n, 1]."""
    return _made(mx.ones((n, 1)))


@cache
def no_bias(experts: int) -> mx.array:
    """Zeros float32 [experts]."""
    return _made(mx.zeros(experts))


def _made(array: mx.array) -> mx.array:
    mx.eval(array)
    return array

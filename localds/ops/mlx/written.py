"""Products of many rows with matrices whose blocks are written out as floats first.

What is written out is multiplied at the speed of the device's matrix products. Large matrices are
written in slices, of which no more than two lie in memory: one is multiplied while the next is
written.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

from localds.memory.gpu_sizes import WRITTEN_BYTES
from localds.ops.mlx.computing import on_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Write = Callable[[mx.array], mx.array]
    """The values [..., columns] of blocks uint8 [..., bytes], in float16 or float32."""

P = ParamSpec("P")
R = TypeVar("R")

SLICE_BYTES = WRITTEN_BYTES // 2


def product(x: mx.array, blocks: mx.array, write: Write, itemsize: int) -> mx.array:
    """X float32 [..., n, columns] times the transpose of `blocks` [..., rows, bytes].

    Each value takes `itemsize` bytes once it is written, 0 where `write` copies nothing.
    """
    rows = blocks.shape[-2]
    matrices = blocks.size // (rows * blocks.shape[-1])
    slices = _slices(rows, matrices * x.shape[-1] * itemsize)
    if len(slices) == 1:
        return _times(x, write(blocks))
    return _joined((_times(x, write(blocks[..., part, :])) for part in slices), axis=-1)


def chosen_product(
    x: mx.array, blocks: mx.array, ids: mx.array, write: Write, itemsize: int
) -> mx.array:
    """Each row of x [m, columns] times the matrix of a stack in ids [m], ascending: [m, rows].

    `itemsize` as for `product`. Where the stack takes several slices, the ids are waited for.
    """
    slices = _slices(len(blocks), blocks.shape[1] * x.shape[1] * itemsize)
    if len(slices) == 1:
        return _times(x, write(blocks), ids)
    ends = np.searchsorted(np.array(ids), [part.stop for part in slices]).tolist()

    def parts() -> Iterator[mx.array]:
        begin = 0
        for part, end in zip(slices, ends, strict=True):
            if begin < end:
                yield _times(x[begin:end], write(blocks[part]), ids[begin:end] - part.start)
            begin = end

    return _joined(parts(), axis=0)


def _slices(count: int, each: int) -> list[slice]:
    """All of `count`, which take `each` bytes."""
    step = min(max(SLICE_BYTES // each, 1), count) if each else count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _joined(parts: Iterator[mx.array], axis: int) -> mx.array:
    """The parts once they are computed, no more than two at a time."""
    found: list[mx.array] = []
    for part in parts:
        mx.async_eval(part)  # type: ignore[no-untyped-call]
        mx.eval(*found[-1:])
        found.append(part)
    joined = mx.concatenate(found, axis=axis)
    mx.eval(joined)
    return joined


def _times(x: mx.array, weight: mx.array, ids: mx.array | None = None) -> mx.array:
    """X times the transpose of the weight, or of that in ids, in the weight's type.

    In float16, with each row's largest value made 1 meanwhile.
    """
    multiply = mx.matmul if ids is None else partial(_gathered, ids=ids)
    transposed = weight.swapaxes(-1, -2)
    if weight.dtype == mx.float32:
        return multiply(x, transposed)
    scaled, size = _scaled(x)
    return _unscaled(multiply(scaled, transposed), size)


def _gathered(x: mx.array, weight: mx.array, ids: mx.array) -> mx.array:
    # With an axis put in by indexing, MLX takes the rows of x from the wrong places.
    rows = mx.contiguous(x).reshape(len(ids), 1, -1)
    return mx.gather_mm(rows, weight, rhs_indices=ids, sorted_indices=True)[:, 0]


def _fused(function: Callable[P, R]) -> Callable[P, R]:
    """One kernel on a GPU."""
    compiled = mx.compile(function, shapeless=True)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (compiled if on_gpu() else function)(*args, **kwargs)

    return call


@_fused
def _scaled(x: mx.array) -> tuple[mx.array, mx.array]:
    """X in float16 with each row's largest value made 1, and those values [..., 1]."""
    size = mx.maximum(mx.abs(x).max(axis=-1, keepdims=True), 1e-30)
    return (x / size).astype(mx.float16), size


@_fused
def _unscaled(y: mx.array, size: mx.array) -> mx.array:
    return y.astype(mx.float32) * size

"""Products with frozen matrices, and with their transposes, which gradients need.

Matrices that MLX multiplies as they are packed stay so. All others are written out as floats, slice
by slice: in float16 on a GPU, where each row of the other factor is scaled to fit, else in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.limits import SLICE_BYTES
from localds.ops.mlx.blocks import dequantize
from localds.ops.mlx.cuda.matrix import CudaMatrix
from localds.ops.mlx.matrix import BlockMatrix, PackedMatrix, PlainMatrix
from localds.ops.mlx.metal.matrix import MetalMatrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.ops.mlx.matrix import Matrix


def mapped(matrix: Matrix, change: Callable[[mx.array], mx.array]) -> Matrix:
    """A matrix whose arrays are those of `matrix` changed: rows left out, or put together."""
    if isinstance(matrix, PlainMatrix):
        return PlainMatrix(change(matrix.weight))
    if isinstance(matrix, PackedMatrix):
        return PackedMatrix(matrix.packed.map(change))
    blocks = _blocks(matrix)
    return replace(blocks, blocks=change(blocks.blocks))


def flattened(stack: Matrix) -> Matrix:
    """The rows of all matrices of a stack as one matrix."""
    return mapped(stack, lambda array: array.reshape(-1, array.shape[-1]))


def _columns(matrix: Matrix) -> int:
    if isinstance(matrix, PlainMatrix):
        return matrix.weight.shape[-1]
    blocks = _blocks(matrix)
    return blocks.blocks.shape[-1] // blocks.kind.block_bytes * blocks.kind.block_elements


def rows_of(matrix: Matrix) -> int:
    """How many rows a matrix has, or each of a stack."""
    return matrix.arrays()[0].shape[-2]


def written(matrix: Matrix) -> mx.array:
    """The values [..., rows, columns], in float16 or float32."""
    if isinstance(matrix, PlainMatrix):
        return matrix.weight.astype(mx.float32)
    if isinstance(matrix, PackedMatrix):
        p = matrix.packed
        # Affine values have the type of their scales, the others the one that is asked for.
        kind = None if p.biases is not None else mx.float32
        return mx.dequantize(*p.arrays(), group_size=32, bits=p.bits, mode=p.mode, dtype=kind)
    if isinstance(matrix, BlockMatrix):
        return dequantize(matrix.kind, matrix.blocks)
    blocks = _blocks(matrix)
    assert not isinstance(blocks, BlockMatrix)  # noqa: S101  it was told apart above
    return blocks.written(blocks.blocks)


def times(matrix: Matrix, x: mx.array) -> mx.array:
    """X [n, columns] times the transpose of the matrix: [n, rows]."""
    if isinstance(matrix, PackedMatrix):
        return matrix(x)
    found: list[mx.array] = []
    for part in _slices(matrix):
        weight = written(_taken(matrix, part, found or [x]))
        found.append(product(x, weight.swapaxes(-1, -2)))
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)


def transposed(matrix: Matrix, y: mx.array) -> mx.array:
    """Y [n, rows] times the matrix: [n, columns]."""
    if isinstance(matrix, PackedMatrix):
        p = matrix.packed
        return mx.quantized_matmul(
            y, *p.arrays(), transpose=False, group_size=32, bits=p.bits, mode=p.mode
        )
    found: list[mx.array] = []
    for part in _slices(matrix):
        one = product(y[:, part], written(_taken(matrix, part, found or [y])))
        found = [one + found[0] if found else one]
    return found[0]


def chosen_times(stack: Matrix, x: mx.array, ids: mx.array) -> mx.array:
    """Each row of x [m, columns] times the transpose of the matrix in ids [m], ascending."""
    if isinstance(stack, PackedMatrix):
        return stack.chosen(x, ids)
    return gathered(x, written(_waiting(stack, x)).swapaxes(-1, -2), ids)


def chosen_transposed(stack: Matrix, y: mx.array, ids: mx.array) -> mx.array:
    """Each row of y [m, rows] times the matrix in ids [m], ascending: [m, columns]."""
    if isinstance(stack, PackedMatrix):
        p = stack.packed
        found = mx.gather_qmm(
            y.reshape(len(y), 1, -1),
            *p.arrays(),
            rhs_indices=ids,
            transpose=False,
            group_size=32,
            bits=p.bits,
            mode=p.mode,
        )
        return found[:, 0]
    return gathered(y, written(_waiting(stack, y)), ids)


def row_squares(matrix: Matrix) -> mx.array:
    """The squared length of each row, float32 [..., rows]; a few rows or matrices at a time."""
    count = len(matrix.arrays()[0])
    each = written(mapped(matrix, lambda array: array[:1])).size
    step = max(SLICE_BYTES // (4 * each), 1)
    found: list[mx.array] = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        values = written(_taken(matrix, part, found)).astype(mx.float32)
        found.append((values * values).sum(axis=-1))
        mx.eval(found[-1])
    return mx.concatenate(found)


def product(x: mx.array, weight: mx.array) -> mx.array:
    """X float32 @ weight, whose type is float32, or float16 with rows of x scaled to at most 1."""
    if weight.dtype == mx.float32:
        return x @ weight
    scaled, size = _scaled(x)
    return (scaled @ weight).astype(mx.float32) * size


def gathered(x: mx.array, weights: mx.array, ids: mx.array) -> mx.array:
    """Each row of x [m, k] @ the matrix of weights [n, k, l] in ids, ascending: float32 [m, l]."""
    if weights.dtype == mx.float32:
        return _gathered(x, weights, ids)
    scaled, size = _scaled(x)
    return _gathered(scaled, weights, ids).astype(mx.float32) * size


def _gathered(x: mx.array, weights: mx.array, ids: mx.array) -> mx.array:
    # With an axis put in by indexing, MLX takes the rows of x from the wrong places on CUDA.
    rows = mx.contiguous(x).reshape(len(x), 1, -1)
    return mx.gather_mm(rows, weights, rhs_indices=ids, sorted_indices=True)[:, 0]


def _scaled(x: mx.array) -> tuple[mx.array, mx.array]:
    """X in float16 with each row's largest value made 1, and those values [..., 1]."""
    size = mx.maximum(mx.abs(x).max(axis=-1, keepdims=True), 1e-30)
    return (x / size).astype(mx.float16), size


def _slices(matrix: Matrix) -> list[slice]:
    rows, columns = rows_of(matrix), _columns(matrix)
    step = max(SLICE_BYTES // (4 * columns), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _taken(matrix: Matrix, part: slice, before: list[mx.array]) -> Matrix:
    """Rows of a matrix, or matrices of a stack, that wait for what was found before."""
    taken = mapped(matrix, lambda array: array[part])
    return _waiting(taken, before[-1]) if before else taken


def _waiting(matrix: Matrix, before: mx.array) -> Matrix:
    """A matrix that is not written out until `before` is there, so that no two lie in memory."""
    return mapped(matrix, lambda array: mx.depends(array, before))


def _blocks(matrix: Matrix) -> BlockMatrix | CudaMatrix | MetalMatrix:
    if not isinstance(matrix, BlockMatrix | CudaMatrix | MetalMatrix):
        raise TypeError(f"no training on a {type(matrix).__name__}")
    return matrix

"""A block type's kernels prove themselves on the device before they are used."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from localds.gguf import GGMLType
from localds.ops.mlx.blocks import dequantize
from localds.ops.mlx.cuda.matrix import CudaMatrix, counted
from localds.ops.mlx.matrix import PLAIN

MATRICES, ROWS, COLUMNS = 2, 5, 512
BOUND = 1e-4


@cache
def failure(kind: GGMLType) -> str:
    """Why the kernels of a type cannot be used on this device; "" if they can.

    They are compiled, and compared with MLX's operations on a few rows.
    """
    size = COLUMNS // kind.block_elements * kind.block_bytes
    # Bytes below 64 make float16 and float32 scales that are small, positive and finite.
    pattern = np.arange(MATRICES * ROWS * size, dtype=np.uint32) * 2654435761 >> 20 & 63
    blocks = mx.array(pattern.astype(np.uint8).reshape(MATRICES, ROWS, size))
    values = blocks.view(PLAIN[kind]) if kind in PLAIN else dequantize(kind, blocks)
    values = values.astype(mx.float32)
    matrix = CudaMatrix(kind, blocks, stacked=True)
    x = mx.sin(mx.arange(MATRICES * COLUMNS) * 0.7).reshape(MATRICES, COLUMNS)
    # Not as a matrix product, which may be of less precision.
    expected = (x[:, None] * values).sum(axis=-1)
    ids, weights = counted(MATRICES, 1)[None], mx.array([[0.5, 2.0]])
    try:
        found = {
            "multiply": (matrix.multiplied(x, ids[0]), expected),
            "combined": (
                matrix.combined(mx.ones((1, ROWS)), x, ids, weights),
                1 + (expected * weights[0][:, None]).sum(axis=0)[None],
            ),
            "gated": (
                matrix.gated(matrix, x, ids.reshape(-1, 1)),
                expected * mx.sigmoid(expected) * expected,
            ),
            "convert": (
                CudaMatrix(kind, blocks[:1], stacked=False).lookup(mx.arange(ROWS)),
                values[0],
            ),
        }
        wrong = [name for name, (result, right) in found.items() if not _close(result, right)]
    except (RuntimeError, OSError, ValueError) as error:
        return str(error)
    return f"{kind.name}: wrong results of {', '.join(wrong)}" if wrong else ""


def _close(result: mx.array, right: mx.array) -> bool:
    """NaN is not close to anything."""
    return bool((mx.abs(result - right).max() <= BOUND * mx.abs(right).max()).item())

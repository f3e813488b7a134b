"""Kernels prove themselves on the device before they are used.

They are compiled, and compared with MLX's operations on small inputs. Where they fail, MLX's
operations are used. Each proof is made once in a process.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.blocks import dequantize
from localds.ops.mlx.cache import decoded, encoded
from localds.ops.mlx.kept import counted
from localds.ops.mlx.metal.attend import STRIDE, attend_one
from localds.ops.mlx.metal.matrix import FEWER_TOGETHER, MORE_TOGETHER, MetalMatrix, multiply
from localds.ops.mlx.metal.source import BLOCKS, ROWS
from localds.ops.mlx.proving import close, reason, sample_blocks, wave

if TYPE_CHECKING:
    from localds.gguf import GGMLType

HALF_BOUND = 1e-3
"""How far values in float16 may be from MLX's, of the largest one."""

MATRICES, MATRIX_ROWS, COLUMNS = 2, 11, 512
HEADS, PAST, RESERVED = 8, 66, 96

DEEPSEEK = (576, 512)
"""Values of a cached row in DeepSeek's own models, and how many are latent."""


def failures() -> dict[str, str]:
    """What fails on this device and why, by name; proves all kernels."""
    reasons = {f"{kind.name} blocks": matrix_failure(kind) for kind in BLOCKS}
    for kind in ROWS:
        reasons[f"attention over {kind.name} rows"] = attention_failure(kind, *DEEPSEEK)
    return {name: reason for name, reason in reasons.items() if reason}


@cache
def matrix_failure(kind: GGMLType) -> str:
    """Why the kernels of a block type cannot be used on this device; "" if they can."""
    if kind not in BLOCKS:
        return f"there are no kernels for {kind.name}"
    return reason(lambda: _products(kind))


@cache
def attention_failure(kind: GGMLType, width: int, value: int) -> str:
    """The same for attention over rows of `width` values of a type, the first `value` latent."""
    if kind not in ROWS or width % STRIDE or value % STRIDE:
        return f"there are no kernels for rows of {value} + {width - value} values of {kind.name}"
    return reason(lambda: _attention(kind, width, value))


def _products(kind: GGMLType) -> dict[str, bool]:
    blocks = sample_blocks(kind, MATRICES, MATRIX_ROWS, COLUMNS)
    matrix, values = MetalMatrix(kind, blocks), dequantize(kind, blocks)
    x, ids = wave(MATRICES, COLUMNS), counted(MATRICES, 1)
    # Not as a matrix product, which may be of less precision.
    expected = (x[:, None] * values).sum(axis=-1)
    return {
        "convert": close(matrix.converted(blocks, mx.float32), values)
        and close(matrix.converted(blocks, mx.float16), values, HALF_BOUND),
        "multiply": close(multiply(kind, blocks, x, ids, FEWER_TOGETHER), expected)
        and close(multiply(kind, blocks, x, ids, MORE_TOGETHER), expected),
    }


def _attention(kind: GGMLType, width: int, value: int) -> dict[str, bool]:
    rows = encoded(wave(RESERVED, width), kind)
    seen = decoded(rows[: PAST + 1], mx.float32)
    queries = wave(HEADS, width) * (16 / width)  # scores of some size: the weights differ
    weights = mx.softmax((queries[:, None] * seen).sum(axis=-1), axis=-1, precise=True)
    expected = (weights[..., None] * seen[:, :value]).sum(axis=1)
    found = attend_one(queries, rows, kind, mx.array([PAST], mx.int32), value)
    return {"attend": close(found, expected)}

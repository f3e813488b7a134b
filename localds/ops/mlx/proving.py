"""What kernels are proved with before they are used: small inputs, and comparing.

Proofs compile kernels and compare their results with those of MLX's operations, which are used
where a kernel fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.gguf import GGMLType

BOUND = 1e-4
"""How far results may be from MLX's, of the largest one."""


def reason(prove: Callable[[], dict[str, bool]]) -> str:
    """Which results `prove` finds to be wrong, or why it cannot tell; "" for none."""
    try:
        wrong = [name for name, right in prove().items() if not right]
    except (RuntimeError, OSError, ValueError) as error:
        return str(error)
    return f"wrong results of {', '.join(wrong)}" if wrong else ""


def close(result: mx.array, right: mx.array, bound: float = BOUND) -> bool:
    """Whether results are as near as `bound`; NaN is not close to anything."""
    return bool((mx.abs(result - right).max() <= bound * mx.abs(right).max()).item())


def wave(*shape: int) -> mx.array:
    """Values float32 between -1 and 1, with no two rows alike."""
    size = int(np.prod(shape))
    return mx.array(np.sin(np.arange(size) * 0.7 + size).astype(np.float32).reshape(shape))


def sample_blocks(kind: GGMLType, matrices: int, rows: int, columns: int) -> mx.array:
    """Blocks uint8 [matrices, rows, bytes] whose values are finite."""
    shape = matrices, rows, columns // kind.block_elements * kind.block_bytes
    # Bytes below 64 make float16 and float32 scales that are small, positive and finite.
    pattern = np.arange(np.prod(shape), dtype=np.uint32) * 2654435761 >> 20 & 63
    return mx.array(pattern.astype(np.uint8).reshape(shape))

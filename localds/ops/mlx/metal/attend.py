"""The kernels of latent attention for one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.metal.source import SIMDGROUP, launch

if TYPE_CHECKING:
    from localds.gguf import GGMLType

STRIDE = 64
"""Values that a simdgroup takes at once, two a thread."""

_SIMDGROUPS = 1024  # that the reserved rows are divided among, over all heads
_PART = 32  # rows that one takes at least
_HEADS = (8, 4, 2, 1)  # of a threadgroup
_MERGING = 256  # threads that put a head's parts together


def attend_one(
    queries: mx.array, rows: mx.array, kind: GGMLType, past: mx.array, value: int
) -> mx.array:
    """One token's scaled `queries` [heads, width] over rows up to `past` int32 [1], included.

    `rows` [reserved, ...] are floats, or bytes of the type `kind`; their first `value` values are
    what is summed up: [heads, value]. Width and value are multiples of `STRIDE`.
    """
    heads, width = queries.shape
    parts = max(min(-(-len(rows) // _PART), _SIMDGROUPS // heads), 1)
    together = next(n for n in _HEADS if heads % n == 0)
    context, state = launch(
        "attend",
        [queries, rows.view(mx.uint8), past],
        [((parts, heads, value), mx.float32), ((parts, heads, 2), mx.float32)],
        groups=(parts, heads // together),
        threads=together * SIMDGROUP,
        kind=kind,
        kWidth=width,
        kValue=value,
    )
    return launch(
        "merge",
        [context, state],
        [((heads, value), mx.float32)],
        groups=(heads, 1),
        threads=_MERGING,
        kValue=value,
    )[0]

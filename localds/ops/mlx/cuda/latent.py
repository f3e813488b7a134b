"""The kernels of attention.cuh: one token's attention over rows of latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.cuda.source import WARP, launch

if TYPE_CHECKING:
    from localds.ops import MlaShape

PARTS = 128
"""Parts of the cache that a token's attention is divided into at most, of PART rows at least."""
PART = 32

CACHED = (GGMLType.F32, GGMLType.F16, GGMLType.Q8_0)
"""The types of rows."""


@dataclass(frozen=True, slots=True)
class Latents:
    """The geometry that kernels are compiled for: rows of `rank` values, then `rope` of a key."""

    type: GGMLType
    heads: int
    query: int
    rank: int
    rope: int

    @classmethod
    def of(cls, shape: MlaShape, kind: GGMLType) -> Latents:
        """The geometry of a layer whose rows are of type `kind`."""
        query = shape.nope + shape.rope_width
        return cls(kind, shape.heads, query, shape.kv_rank, shape.rope_width)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.rank + self.rope

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width // self.type.block_elements * self.type.block_bytes

    @property
    def fits(self) -> bool:
        """Whether a warp's pairs make up latents and keys."""
        return self.type in CACHED and self.rank % 64 == 0 and self.rope % 64 == 0


def prepare(
    latents: Latents,
    kv: mx.array,
    queries: mx.array,
    norm: mx.array,
    table: mx.array,
    past: mx.array,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """The row to cache uint8 [1, row_bytes], and the queries' turned ends [heads, rope].

    Of kv [1, width] and queries [1, heads * query]; `table` is that of `Turns`, at position `past`.
    """
    row, turned = launch(
        "prepare",
        [kv, queries, norm, table, past],
        [((1, latents.row_bytes), mx.uint8), ((latents.heads, latents.rope), mx.float32)],
        scalars=[table.shape[1], eps],
        blocks=(latents.heads + 1, 1),
        threads=WARP,
        kind=latents.type,
        kHeads=latents.heads,
        kQuery=latents.query,
        kRank=latents.rank,
        kWidth=latents.width,
    )
    return row, turned


def attend(
    latents: Latents,
    absorbed: mx.array,
    turned: mx.array,
    rows: mx.array,
    past: mx.array,
    scale: float,
) -> mx.array:
    """The heads' weighted sums of latents [heads, rank], over the first past + 1 of `rows`.

    Of queries in two parts, absorbed [heads, rank] and turned [heads, rope].
    """
    heads, reserved = latents.heads, len(rows)
    parts = min(-(-reserved // PART), PARTS)
    together = 8 if heads % 8 == 0 else 1
    context, state = launch(
        "attend",
        [absorbed, turned, rows, past],
        [((parts, heads, latents.rank), mx.float32), ((parts, heads, 2), mx.float32)],
        scalars=[heads, reserved, scale],
        blocks=(parts, heads // together),
        threads=together * WARP,
        kind=latents.type,
        kWidth=latents.width,
        kValue=latents.rank,
    )
    return launch(
        "merge",
        [context, state],
        [((heads, latents.rank), mx.float32)],
        scalars=[parts, heads],
        blocks=(heads, 1),
        threads=256,
        kValue=latents.rank,
    )[0]

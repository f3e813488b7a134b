"""Multi-head latent attention of one token, in few kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.attention import MlxMla
from localds.ops.mlx.cache import device_rows
from localds.ops.mlx.cuda.matrix import WARP, CudaMatrix, counted
from localds.ops.mlx.cuda.source import launch

if TYPE_CHECKING:
    from localds.memory.latents import LayerCache
    from localds.ops.mlx.attention import Past

PARTS = 128
"""Parts of the cache that a token's attention is divided into at most, of PART rows at least."""
PART = 32


class CudaMla(MlxMla):
    """`MlxMla`; one token at a position that the graph does not know goes through own kernels."""

    __slots__ = ()

    def __call__(self, x: mx.array, cache: LayerCache, past: Past) -> mx.array:
        """Return x + attention(norm(x)) after writing rows `past` and on of the cache."""
        k_b, v_b, g = self.k_b, self.v_b, self.shape
        if (
            isinstance(past, int)
            or len(x) > 1
            or g.kv_rank % 64
            or g.rope_width % 64
            or not isinstance(k_b, CudaMatrix)
            or not isinstance(v_b, CudaMatrix)
        ):
            return super().__call__(x, cache, past)
        h = mx.fast.rms_norm(x, self.norm, g.eps)
        rows = device_rows(cache)
        queries = self._projected(h)
        row, turned = self._prepare(self.kv_a(h), queries, past, rows.rows.dtype)
        heads = counted(g.heads, 1)
        absorbed = k_b.multiplied(queries.reshape(g.heads, -1), heads)
        context = self._attend(absorbed, turned, rows.write(row, past), past)
        return self.output.plus(x, v_b.multiplied(context, heads).reshape(1, -1))

    def _prepare(
        self, kv: mx.array, queries: mx.array, past: mx.array, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """The row to cache [1, width], and the turned ends of the queries [heads, rope]."""
        g, table = self.shape, self.turns.table
        row, turned = launch(
            "prepare",
            [kv, queries, self.kv_norm, table, past],
            [((1, g.kv_rank + g.rope_width), dtype), ((g.heads, g.rope_width), mx.float32)],
            scalars=[*table.shape[1:], g.latent_eps],
            blocks=(g.heads + 1, 1),
            threads=WARP,
            kHeads=g.heads,
            kQuery=g.nope + g.rope_width,
            kRank=g.kv_rank,
            T=_type(dtype),
        )
        return row, turned

    def _attend(
        self, absorbed: mx.array, turned: mx.array, rows: mx.array, past: mx.array
    ) -> mx.array:
        """The heads' weighted sums of latents, [heads, kv_rank]."""
        g = self.shape
        parts = min(-(-len(rows) // PART), PARTS)
        together = 8 if g.heads % 8 == 0 else 1
        context, state = launch(
            "attend",
            [absorbed, turned, rows, past],
            [((parts, g.heads, g.kv_rank), mx.float32), ((parts, g.heads, 2), mx.float32)],
            scalars=[g.heads, len(rows), g.softmax_scale],
            blocks=(parts, g.heads // together),
            threads=together * WARP,
            kWidth=rows.shape[1],
            kValue=g.kv_rank,
            T=_type(rows.dtype),
        )
        return launch(
            "merge",
            [context, state],
            [((g.heads, g.kv_rank), mx.float32)],
            scalars=[parts, g.heads],
            blocks=(g.heads, 1),
            threads=256,
            kValue=g.kv_rank,
        )[0]


def _type(dtype: mx.Dtype) -> str:
    return "half_t" if dtype == mx.float16 else "float"

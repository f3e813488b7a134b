"""Multi-head latent attention of one token, in few kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.attention import MlxMla
from localds.ops.mlx.cache import device_rows
from localds.ops.mlx.cuda.latent import Latents, attend, prepare
from localds.ops.mlx.cuda.matrix import CudaMatrix
from localds.ops.mlx.cuda.proof import attention_failure
from localds.ops.mlx.kept import counted

if TYPE_CHECKING:
    from localds.memory.latents import LayerCache
    from localds.ops.mlx.attention import Past
    from localds.ops.mlx.cache import DeviceRows


class CudaMla(MlxMla):
    """`MlxMla`; one token at a position that the graph does not know goes through own kernels."""

    __slots__ = ()

    def __call__(self, x: mx.array, cache: LayerCache, past: Past) -> mx.array:
        """Return x + attention(norm(x)) after writing rows `past` and on of the cache."""
        k_b, v_b = self.k_b, self.v_b
        if (
            isinstance(past, int)
            or len(x) > 1
            or not isinstance(k_b, CudaMatrix)
            or not isinstance(v_b, CudaMatrix)
        ):
            return super().__call__(x, cache, past)
        rows = device_rows(cache)
        latents = Latents.of(self.shape, rows.type)
        if not latents.fits or attention_failure(latents):
            return super().__call__(x, cache, past)
        values = self._values(x, rows, past, latents, k_b, v_b)
        return self.output.plus(x, values)

    def _values(
        self,
        x: mx.array,
        rows: DeviceRows,
        past: mx.array,
        latents: Latents,
        k_b: CudaMatrix,
        v_b: CudaMatrix,
    ) -> mx.array:
        """All heads' values [1, heads * value], after writing the row."""
        g = self.shape
        h = mx.fast.rms_norm(x, self.norm, g.eps)
        queries = self._projected(h)
        row, turned = prepare(
            latents, self.kv_a(h), queries, self.kv_norm, self.turns.table, past, g.latent_eps
        )
        seen = rows.write(row.view(rows.rows.dtype), past)
        heads = counted(g.heads, 1)
        absorbed = k_b.multiplied(queries.reshape(g.heads, -1), heads)
        context = attend(latents, absorbed, turned, seen, past, g.softmax_scale)
        return v_b.multiplied(context, heads).reshape(1, -1)

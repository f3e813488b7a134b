"""Multi-head latent attention of one token, by kernels that read the cached rows as they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.attention import MlxMla
from localds.ops.mlx.cache import device_rows
from localds.ops.mlx.metal.attend import attend_one
from localds.ops.mlx.metal.proof import attention_failure

if TYPE_CHECKING:
    from localds.memory.latents import LayerCache
    from localds.ops.mlx.attention import Past


class MetalMla(MlxMla):
    """`MlxMla`; one token goes through own kernels if they work on this device."""

    __slots__ = ()

    def __call__(self, x: mx.array, cache: LayerCache, past: Past) -> mx.array:
        """Return x + attention(norm(x)) after writing rows `past` and on of the cache."""
        g, rows = self.shape, device_rows(cache)
        width = g.kv_rank + g.rope_width
        if len(x) > 1 or attention_failure(rows.type, width, g.kv_rank):
            return super().__call__(x, cache, past)
        if isinstance(past, int):
            rows.reserve(past + 1)
            self.turns.reserve(past + 1)
        h = mx.fast.rms_norm(x, self.norm, g.eps)
        rows.write(self._latents(h, past), past)
        position = mx.array([past], mx.int32) if isinstance(past, int) else past
        queries = self._queries(h, past)[:, 0]
        context = attend_one(queries, rows.rows, rows.type, position, g.kv_rank)
        return self.output.plus(x, self.v_b(context[:, None]).reshape(1, -1))

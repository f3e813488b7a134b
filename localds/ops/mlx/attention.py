"""Attention layers on MLX: multi-head latent and grouped-query, over rows in device memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.attend import attend, attend_grouped
from localds.ops.mlx.cache import Turns, device_rows

if TYPE_CHECKING:
    from localds.memory.latents import LayerCache
    from localds.ops import GqaShape, MlaShape
    from localds.ops.mlx.matrix import Matrix

    Past = int | mx.array


@dataclass(frozen=True, slots=True)
class MlxMla:
    """Multi-head latent attention in the absorbed form: queries meet the cached latents as such.

    `past` may also be an array [1]: then the graph serves any position that fits the reserved rows.
    """

    shape: MlaShape
    turns: Turns
    norm: mx.array
    q_a: Matrix | None
    q_norm: mx.array | None
    q: Matrix
    kv_a: Matrix
    kv_norm: mx.array
    k_b: Matrix
    v_b: Matrix
    output: Matrix

    def __call__(self, x: mx.array, cache: LayerCache, past: Past) -> mx.array:
        """Return x + attention(norm(x)) after writing rows `past` and on of the cache."""
        g, n = self.shape, len(x)
        rows = device_rows(cache)
        if isinstance(past, int):
            rows.reserve(past + n)
            self.turns.reserve(past + n)
        h = mx.fast.rms_norm(x, self.norm, g.eps)
        seen = rows.write(self._latents(h, past), past)
        context = attend(self._queries(h, past), seen, past, g.kv_rank)
        values = self.v_b(context)  # [heads, n, value]
        return self.output.plus(x, values.swapaxes(0, 1).reshape(n, -1))

    def _latents(self, h: mx.array, past: Past) -> mx.array:
        """The rows to cache, [n, kv_rank + rope]."""
        kv = self.kv_a(h)
        latent = mx.fast.rms_norm(kv[:, : self.shape.kv_rank], self.kv_norm, self.shape.latent_eps)
        return mx.concatenate([latent, self.turns.rotate(kv[:, self.shape.kv_rank :], past)], -1)

    def _queries(self, h: mx.array, past: Past) -> mx.array:
        """Absorbed and scaled, [heads, n, kv_rank + rope]."""
        g = self.shape
        q = self._projected(h).reshape(len(h), g.heads, g.nope + g.rope_width).swapaxes(0, 1)
        rotated = self.turns.rotate(q[..., g.nope :], past)
        return mx.concatenate([self.k_b(q[..., : g.nope]), rotated], -1) * g.softmax_scale

    def _projected(self, h: mx.array) -> mx.array:
        """The queries of all heads, [n, heads * (nope + rope)]."""
        if self.q_a is not None:
            h = mx.fast.rms_norm(self.q_a(h), self.q_norm, self.shape.latent_eps)
        return self.q(h)


@dataclass(frozen=True, slots=True)
class MlxGqa:
    """Grouped-query attention; `past` as for `MlxMla`."""

    shape: GqaShape
    turns: Turns
    norm: mx.array
    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix

    def __call__(self, x: mx.array, cache: LayerCache, past: Past) -> mx.array:
        """Return x + attention(norm(x)) after writing rows `past` and on of the cache."""
        g, n = self.shape, len(x)
        rows = device_rows(cache)
        if isinstance(past, int):
            rows.reserve(past + n)
            self.turns.reserve(past + n)
        h = mx.fast.rms_norm(x, self.norm, g.eps)
        keys = self._rotated(self.k(h), past).swapaxes(0, 1).reshape(n, -1)
        seen = rows.write(mx.concatenate([keys, self.v(h)], -1), past)
        q = self._rotated(self.q(h), past) * g.softmax_scale
        context = attend_grouped(q, seen, past, g.kv_heads)
        return self.output.plus(x, context.swapaxes(0, 1).reshape(n, -1))

    def _rotated(self, x: mx.array, past: Past) -> mx.array:
        """Heads of x [n, heads * head] with their first values turned: [heads, n, head]."""
        width = 2 * len(self.shape.rope.inverse_frequencies)
        heads = x.reshape(len(x), -1, self.shape.head).swapaxes(0, 1)
        turned = self.turns.rotate(heads[..., :width], past)
        return mx.concatenate([turned, heads[..., width:]], -1)

"""Attention layers in training: no cache, and adapters on every projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.model.attend import attend

if TYPE_CHECKING:
    from localds.finetune.model.adapter import Linear, Trained
    from localds.finetune.model.packing import Packing
    from localds.ops import GqaShape, MlaShape
    from localds.ops.mlx.cache import Turns


@dataclass(frozen=True, slots=True)
class TrainMla:
    """Multi-head latent attention in the expanded form: keys and values of every head."""

    shape: MlaShape
    turns: Turns
    norm: mx.array
    q_a: Linear | None
    q_norm: mx.array | None
    q: Linear
    kv_a: Linear
    kv_norm: mx.array
    kv_b: Linear
    output: Linear

    def __call__(self, x: mx.array, packing: Packing, trained: Trained) -> mx.array:
        """Return x + attention(norm(x)), x float32 [rows, length, hidden]."""
        g, (rows, length, hidden) = self.shape, x.shape
        h = mx.fast.rms_norm(x, self.norm, g.eps).reshape(-1, hidden)
        q = self._queries(h, trained).reshape(rows, length, g.heads, -1).swapaxes(1, 2)
        rotated = packing.rotate(q[..., g.nope :], self.turns)
        q = mx.concatenate([q[..., : g.nope], rotated], -1) * g.softmax_scale
        kv = self.kv_a(h, trained)
        shared = kv[:, g.kv_rank :].reshape(rows, 1, length, -1)
        shared = packing.rotate(shared, self.turns)
        latent = mx.fast.rms_norm(kv[:, : g.kv_rank], self.kv_norm, g.latent_eps)
        expanded = self.kv_b(latent, trained).reshape(rows, length, g.heads, -1).swapaxes(1, 2)
        shared = mx.broadcast_to(shared, (rows, g.heads, length, g.rope_width))
        k = mx.concatenate([expanded[..., : g.nope], shared], -1)
        context = attend(q, k, expanded[..., g.nope :], packing.segments)
        context = context.swapaxes(1, 2).reshape(rows * length, -1)
        return x + self.output(context, trained).reshape(x.shape)

    def _queries(self, h: mx.array, trained: Trained) -> mx.array:
        if self.q_a is not None:
            ranked = self.q_a(h, trained)
            h = mx.fast.rms_norm(ranked, self.q_norm, self.shape.latent_eps)
        return self.q(h, trained)


@dataclass(frozen=True, slots=True)
class TrainGqa:
    """Grouped-query attention."""

    shape: GqaShape
    turns: Turns
    norm: mx.array
    q: Linear
    k: Linear
    v: Linear
    output: Linear

    def __call__(self, x: mx.array, packing: Packing, trained: Trained) -> mx.array:
        """Return x + attention(norm(x)), x float32 [rows, length, hidden]."""
        rows, length, hidden = x.shape
        h = mx.fast.rms_norm(x, self.norm, self.shape.eps).reshape(-1, hidden)

        def heads(linear: Linear) -> mx.array:
            projected = linear(h, trained).reshape(rows, length, -1, self.shape.head)
            return projected.swapaxes(1, 2)

        q = self._rotated(heads(self.q), packing) * self.shape.softmax_scale
        k = self._rotated(heads(self.k), packing)
        context = attend(q, k, heads(self.v), packing.segments)
        context = context.swapaxes(1, 2).reshape(rows * length, -1)
        return x + self.output(context, trained).reshape(x.shape)

    def _rotated(self, x: mx.array, packing: Packing) -> mx.array:
        """The first values of each head turned."""
        width = 2 * len(self.shape.rope.inverse_frequencies)
        return mx.concatenate([packing.rotate(x[..., :width], self.turns), x[..., width:]], axis=-1)

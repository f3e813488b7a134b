"""Causal attention within segments, in bounded memory forward and backward.

Scores exist for a block of queries at a time, and are computed again for the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from localds.finetune.limits import SCORE_BYTES
from localds.finetune.model.gradients import with_vjp


def attend(q: mx.array, k: mx.array, v: mx.array, segments: mx.array) -> mx.array:
    """Attention of queries [rows, heads, length, width], already scaled, float32.

    Keys [rows, groups, length, width] and values [rows, groups, length, value] serve heads / groups
    heads each. Returns [rows, heads, length, value].
    """

    def apply(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        found: list[mx.array] = []
        for block in _blocks(q, k.shape[1], segments):
            weights = block.weights(_after(q, found[-1:]), k)
            found.append(block.by_head(weights @ v[:, :, : block.end]))
        return mx.concatenate(found, axis=2)

    return with_vjp(apply, partial(_gradient, segments))(q, k, v)


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries `start` to `end`, which see no later key."""

    start: int
    end: int
    groups: int
    segments: mx.array

    def taken(self, x: mx.array) -> mx.array:
        """The block's part of x [rows, heads, length, width]: [rows, groups, queries, width]."""
        part = x[:, :, self.start : self.end]
        return part.reshape(len(x), self.groups, -1, x.shape[-1])

    def by_head(self, x: mx.array) -> mx.array:
        """Back from [rows, groups, queries, width]: [rows, heads, end - start, width]."""
        return x.reshape(len(x), -1, self.end - self.start, x.shape[-1])

    def weights(self, q: mx.array, k: mx.array) -> mx.array:
        """How much queries look at each key, [rows, groups, queries, end]."""
        scores = self.taken(q) @ k[:, :, : self.end].swapaxes(-1, -2)
        by_head = mx.where(self._visible(), self.by_head(scores), -mx.inf)
        return mx.softmax(by_head.reshape(scores.shape), axis=-1)

    def _visible(self) -> mx.array:
        """What is earlier and of the same segment, [rows, 1, end - start, end]."""
        at = mx.arange(self.start, self.end)[:, None]
        mine = self.segments[:, self.start : self.end, None]
        same = mine == self.segments[:, None, : self.end]
        return (same & (mx.arange(self.end) <= at))[:, None]


def _blocks(q: mx.array, groups: int, segments: mx.array) -> list[_Block]:
    rows, heads, length, _ = q.shape
    step = max(SCORE_BYTES // (4 * rows * heads * length), 1)
    return [
        _Block(start, min(start + step, length), groups, segments)
        for start in range(0, length, step)
    ]


def _gradient(
    segments: mx.array,
    arguments: tuple[mx.array, mx.array, mx.array],
    dy: mx.array,
    y: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of queries, keys and values."""
    q, k, v = arguments
    dot = (dy * y).sum(axis=-1, keepdims=True)
    dq: list[mx.array] = []
    dk, dv = mx.zeros_like(k), mx.zeros_like(v)
    for block in _blocks(q, k.shape[1], segments):
        end = block.end
        weights = block.weights(_after(q, [dk, dv]), k)
        dy_block = block.taken(dy)
        ds = weights * (dy_block @ v[:, :, :end].swapaxes(-1, -2) - block.taken(dot))
        dq.append(block.by_head(ds @ k[:, :, :end]))
        dk = _added(dk, ds.swapaxes(-1, -2) @ block.taken(q))
        dv = _added(dv, weights.swapaxes(-1, -2) @ dy_block)
    return mx.concatenate(dq, axis=2), dk, dv


def _added(total: mx.array, first: mx.array) -> mx.array:
    """Total [..., length, width] with `first` added to its first rows."""
    end = first.shape[2]
    if end == total.shape[2]:
        return total + first
    return mx.concatenate([total[:, :, :end] + first, total[:, :, end:]], axis=2)


def _after(x: mx.array, before: list[mx.array]) -> mx.array:
    """X once what is before is computed: MLX takes memory for whatever can begin."""
    return mx.depends(x, before) if before else x

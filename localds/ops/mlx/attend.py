"""Attention over the cached rows in bounded memory: blocks of queries, and spans of keys.

MLX takes memory for whatever can begin. So outside of graphs each part is waited for, and within
them, where that is impossible, each depends on the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from localds.memory.latents import attention_blocks
from localds.ops.mlx.cache import cached_width, decoded

if TYPE_CHECKING:
    from collections.abc import Callable

    Past = int | mx.array
    Split = Callable[[mx.array], tuple[mx.array, mx.array]]
    """Keys [groups, length, width] and values [groups, length, value] of rows [length, ...]."""


class Part(NamedTuple):
    """What queries found in some of the keys: float32 [heads, n, value] and [heads, n, 1].

    `context` are the values weighted by the softmax over these keys, `total` the logarithm of the
    sum of all exponentials.
    """

    context: mx.array
    total: mx.array

    def plus(self, other: Part) -> Part:
        """The same for the keys of both."""
        total = mx.logaddexp(self.total, other.total)
        mine, others = mx.exp(self.total - total), mx.exp(other.total - total)
        return Part(self.context * mine + other.context * others, total)


def attend(q: mx.array, rows: mx.array, past: Past, value: int) -> mx.array:
    """Attention of queries [heads, n, width] over `rows` as kept, which all heads share.

    The first `value` elements of a row are also its values. The queries are scaled; the first is at
    position `past`, which may be an array [1] in a graph that serves any, where rows that are not
    yet written may follow. Returns float32 [heads, n, value].
    """
    halves = rows.dtype != mx.float32 and _long(q, past)  # at the speed of 16-bit products
    dtype = mx.float16 if halves else mx.float32

    def split(part: mx.array) -> tuple[mx.array, mx.array]:
        return part[None], part[None, :, :value]

    return _by_queries(q, rows, past, dtype, split)


def attend_grouped(q: mx.array, rows: mx.array, past: Past, groups: int) -> mx.array:
    """Attention of queries [heads, n, width] over `rows` of `groups` keys, then as many values.

    Otherwise as `attend`.
    """
    kept = rows.dtype != mx.uint8
    halves = rows.dtype == mx.float16 or (not kept and _long(q, past))
    dtype = mx.float16 if halves else mx.float32

    def split(part: mx.array) -> tuple[mx.array, mx.array]:
        both = part.reshape(len(part), 2, groups, -1).transpose(1, 2, 0, 3)
        return both[0], both[1]

    return _by_queries(q, rows, past, dtype, split, fused=True)


def _long(q: mx.array, past: Past) -> bool:
    return isinstance(past, int) and q.shape[1] > 1


def _by_queries(
    q: mx.array, rows: mx.array, past: Past, dtype: mx.Dtype, split: Split, *, fused: bool = False
) -> mx.array:
    """Block by block of queries, with products in `dtype`; `fused` by MLX's own kernel."""
    heads, n, _ = q.shape
    length = len(rows)
    converted = rows.dtype != dtype
    width = cached_width(rows)
    queries, keys = attention_blocks(heads, n, length, width, dtype.size, converted=converted)
    contexts = []
    for start in range(0, n, queries):
        block = q[:, start : start + queries].astype(dtype)
        at = past + start
        seen = rows[: at + block.shape[1]] if isinstance(at, int) else rows
        if fused and len(seen) <= keys:
            context = _fused(block, *split(decoded(seen, dtype)), at)
        else:
            context = _by_keys(block, seen, at, keys, split)
        if n > queries and isinstance(past, int):
            mx.eval(context)
        contexts.append(context)
    return mx.concatenate(contexts, axis=1) if n > queries else contexts[0]


def _by_keys(q: mx.array, rows: mx.array, past: Past, keys: int, split: Split) -> mx.array:
    """Span by span of `keys` rows, each of which is only converted after the one before."""
    found = None
    for start in range(0, len(rows), keys):
        span = rows[start : start + keys]
        if found is not None:
            span = mx.depends(span, found.context)
        part = _part(q, *split(decoded(span, q.dtype)), past - start)
        found = part if found is None else found.plus(part)
        if len(rows) > keys and isinstance(past, int):
            mx.eval(*found)
    assert found is not None  # noqa: S101  there are rows: the queries' own
    return found.context


def _part(q: mx.array, keys: mx.array, values: mx.array, past: Past) -> Part:
    """Attention over one span; `past` is counted from its first key."""
    heads, n, width = q.shape
    groups, length, _ = keys.shape
    scores = q.reshape(groups, -1, width) @ keys.swapaxes(1, 2)
    visible = _visible(n, length, past)
    if visible is not None:
        # Not infinite: of a span that no query sees, the weights would be no numbers.
        least = mx.finfo(scores.dtype).min
        scores = mx.where(visible, scores.reshape(groups, -1, n, length), least)
        scores = scores.reshape(groups, -1, length)
    largest = scores.max(axis=-1, keepdims=True).astype(mx.float32)
    weights = mx.softmax(scores, axis=-1, precise=True)
    total = largest - mx.log(weights.max(axis=-1, keepdims=True).astype(mx.float32))
    context = (weights @ values).astype(mx.float32)
    return Part(context.reshape(heads, n, -1), total.reshape(heads, n, 1))


def _visible(n: int, length: int, past: Past) -> mx.array | None:
    """Which keys queries see, [n, length]; None if that's all of them."""
    if isinstance(past, int) and length <= past + 1:
        return None
    return mx.arange(length) <= mx.arange(n)[:, None] + past


def _fused(q: mx.array, keys: mx.array, values: mx.array, past: Past) -> mx.array:
    """Attention over all keys by MLX's kernel."""
    mask: mx.array | str | None = "causal"
    if not isinstance(past, int):
        mask = _visible(q.shape[1], keys.shape[1], past)
    context = mx.fast.scaled_dot_product_attention(
        q[None], keys[None], values[None], scale=1.0, mask=mask
    )
    return context[0].astype(mx.float32)

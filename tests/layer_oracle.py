"""Layers in numpy float64, written from the papers: the oracle of the fused operations.

Weights are plain matrices [rows, cols], in a dict by the field names of the contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from localds.ops import GqaShape, MlaShape, Rope, Router

    Array = NDArray[np.float64]
    Weights = dict[str, Any]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: Array, positions: Array, rope: Rope) -> Array:
    """Turn the pairs (2i, 2i + 1) of the last axis, seen as complex numbers; x [tokens, ..., d]."""
    angles = np.outer(positions, rope.inverse_frequencies.astype(np.float64))
    turn = rope.amplitude * np.exp(1j * angles)
    turn = turn.reshape(len(positions), *[1] * (x.ndim - 2), -1)
    width = 2 * turn.shape[-1]
    turned = (x[..., 0:width:2] + 1j * x[..., 1:width:2]) * turn
    out = x.copy()
    out[..., 0:width:2], out[..., 1:width:2] = turned.real, turned.imag
    return out


def softmax(x: Array) -> Array:
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """q [n, heads, d], k [n, heads, d], v [n, heads, dv] -> [n, heads, dv]."""
    scores = np.einsum("thd,shd->hts", q, k) * scale
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    return np.einsum("hts,shv->thv", softmax(scores), v)


def mla_rows(x: Array, w: Weights, g: MlaShape) -> Array:
    """What the cache should hold for the tokens x: the normalized latent and the rotated key."""
    kv = rms_norm(x, w["norm"], g.eps) @ w["kv_a"].T
    latent = rms_norm(kv[:, : g.kv_rank], w["kv_a_norm"], g.latent_eps)
    return np.concatenate([latent, rotate(kv[:, g.kv_rank :], np.arange(len(x)), g.rope)], 1)


def mla_heads(x: Array, w: Weights, g: MlaShape, rows: Array) -> tuple[Array, Array, Array]:
    """Queries of x, and keys and values expanded from cached rows, all [n, heads, width]."""
    n = len(x)
    h = rms_norm(x, w["norm"], g.eps)
    if "q_a" in w:
        h = rms_norm(h @ w["q_a"].T, w["q_a_norm"], g.latent_eps)
    q = (h @ w["q_b" if "q_a" in w else "q"].T).reshape(n, g.heads, g.nope + g.rope_width)
    q_rope = rotate(q[..., g.nope :], np.arange(n), g.rope)
    kv_b = w["kv_b"].reshape(g.heads, g.nope + g.value, g.kv_rank)
    expanded = np.einsum("sr,hor->sho", rows[:, : g.kv_rank], kv_b)
    k_rope = np.broadcast_to(rows[:, None, g.kv_rank :], (n, g.heads, g.rope_width))
    return (
        np.concatenate([q[..., : g.nope], q_rope], -1),
        np.concatenate([expanded[..., : g.nope], k_rope], -1),
        expanded[..., g.nope :],
    )


def mla(x: Array, w: Weights, g: MlaShape, cached: Array | None = None) -> Array:
    """x + attention(norm(x)) with keys and values expanded from the rows `cached`."""
    rows = mla_rows(x, w, g) if cached is None else cached
    context = causal_attention(*mla_heads(x, w, g, rows), g.softmax_scale)
    return x + context.reshape(len(x), -1) @ w["output"].T


def gqa_heads(x: Array, w: Weights, g: GqaShape, rows: Array) -> tuple[Array, Array, Array]:
    """Queries of x, and the keys and values of cached rows, all [n, heads, width]."""
    n = len(x)
    q = (rms_norm(x, w["norm"], g.eps) @ w["q"].T).reshape(n, g.heads, g.head)
    k, v = (half.reshape(n, g.kv_heads, g.head) for half in np.split(rows, 2, axis=1))
    repeat = g.heads // g.kv_heads
    return rotate(q, np.arange(n), g.rope), k.repeat(repeat, 1), v.repeat(repeat, 1)


def gqa_rows(x: Array, w: Weights, g: GqaShape) -> Array:
    """What the cache should hold for the tokens x: rotated keys, then values."""
    h = rms_norm(x, w["norm"], g.eps)
    k = (h @ w["k"].T).reshape(len(x), g.kv_heads, g.head)
    k = rotate(k, np.arange(len(x)), g.rope).reshape(len(x), -1)
    return np.concatenate([k, h @ w["v"].T], 1)


def gqa(x: Array, w: Weights, g: GqaShape, cached: Array | None = None) -> Array:
    rows = gqa_rows(x, w, g) if cached is None else cached
    context = causal_attention(*gqa_heads(x, w, g, rows), g.softmax_scale)
    return x + context.reshape(len(x), -1) @ w["output"].T


def gated_middle(h: Array, gate: Array, up: Array) -> Array:
    a = h @ gate.T
    return a / (1 + np.exp(-a)) * (h @ up.T)


def gated(h: Array, gate: Array, up: Array, down: Array) -> Array:
    return gated_middle(h, gate, up) @ down.T


def ffn(x: Array, w: Weights, eps: float) -> Array:
    return x + gated(rms_norm(x, w["norm"], eps), w["gate"], w["up"], w["down"])


def route(logits: Array, router: Router, bias: Array | None) -> tuple[list[int], list[float]]:
    """One token's experts, best first, and their weights."""
    p = {
        "softmax": softmax(logits),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "softmax_selected": logits,
    }[router.gating]
    choice = p if bias is None else p + bias
    if router.groups > 1:
        groups = choice.reshape(router.groups, -1)
        best = np.sort(groups, 1)[:, ::-1]
        score = best[:, 0] if router.group_score == "max" else best[:, :2].sum(1)
        keep = np.argsort(-score, kind="stable")[: router.groups_used]
        groups = np.where(np.isin(np.arange(router.groups), keep)[:, None], groups, -np.inf)
        choice = groups.reshape(-1)
    ids = np.argsort(-choice, kind="stable")[: router.top_k]
    weights = softmax(p[ids]) if router.gating == "softmax_selected" else p[ids]
    if router.normalize:
        weights = weights / (weights.sum() + 1e-20)
    return ids.tolist(), (weights * router.scale).tolist()


def moe(x: Array, w: Weights, router: Router, eps: float) -> Array:
    h = rms_norm(x, w["norm"], eps)
    out = x.copy()
    for t, token in enumerate(h):
        for e, weight in zip(
            *route(w["router"] @ token, router, w.get("router_bias")), strict=True
        ):
            out[t] += weight * gated(token, w["gate"][e], w["up"][e], w["down"][e])
        if "shared_gate" in w:
            out[t] += gated(token, w["shared_gate"], w["shared_up"], w["shared_down"])
    return out

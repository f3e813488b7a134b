"""Kernels prove themselves on the device before they are used.

They are compiled, and compared with MLX's operations on small inputs. Where they fail, MLX's
operations are used. Each proof is made once in a process.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from localds.gguf import GGMLType
from localds.ops import Gating, Router
from localds.ops.mlx.blocks import QUANTIZED, dequantize
from localds.ops.mlx.cache import decoded, encoded
from localds.ops.mlx.cuda.latent import CACHED, Latents, attend, prepare
from localds.ops.mlx.cuda.matrix import FEWER_TOGETHER, MORE_TOGETHER, CudaMatrix
from localds.ops.mlx.cuda.routing import route
from localds.ops.mlx.kept import counted
from localds.ops.mlx.matrix import PLAIN
from localds.ops.mlx.proving import BOUND, close, reason, sample_blocks, wave
from localds.ops.mlx.routing import choose_experts

ROUNDING = {GGMLType.F32: BOUND, GGMLType.F16: 1e-3, GGMLType.Q8_0: 5e-3}
"""How far the values of a cached row may be."""

MATRICES, ROWS, COLUMNS = 2, 5, 512
RESERVED, PAST, POSITIONS = 70, 40, 48
EPS, SCALE = 1e-6, 0.05

ROUTERS = (
    Router(64, 6, Gating.SOFTMAX, normalize=False, scale=1.0),
    Router(256, 8, Gating.SIGMOID, normalize=True, scale=2.5, groups=8, groups_used=4),
    Router(8, 2, Gating.SOFTMAX_SELECTED, normalize=False, scale=1.0),
)
"""Routers as of V2-Lite, V3 and Mixtral."""


def failures() -> dict[str, str]:
    """What fails on this device and why, by name; proves all kernels, which takes some seconds."""
    reasons = {f"{kind.name} blocks": matrix_failure(kind) for kind in (*QUANTIZED, *PLAIN)}
    for kind in CACHED:
        latents = Latents(kind, heads=16, query=192, rank=512, rope=64)
        reasons[f"attention over {kind.name} rows"] = attention_failure(latents)
    for router in ROUTERS:
        reasons[f"{router.gating} routing"] = routing_failure(router)
    return {name: reason for name, reason in reasons.items() if reason}


@cache
def matrix_failure(kind: GGMLType) -> str:
    """Why the kernels of a block type cannot be used on this device; "" if they can."""
    return reason(lambda: _products(kind))


@cache
def attention_failure(latents: Latents) -> str:
    """The same for the kernels of latent attention."""
    return reason(lambda: _attention(latents))


@cache
def routing_failure(router: Router) -> str:
    """The same for the choice of experts."""
    return reason(lambda: _routing(router))


def _products(kind: GGMLType) -> dict[str, bool]:
    blocks = sample_blocks(kind, MATRICES, ROWS, COLUMNS)
    values = blocks.view(PLAIN[kind]) if kind in PLAIN else dequantize(kind, blocks)
    values = values.astype(mx.float32)
    matrix = CudaMatrix(kind, blocks)
    x = wave(MATRICES, COLUMNS)
    # Not as a matrix product, which may be of less precision.
    expected = (x[:, None] * values).sum(axis=-1)
    ids, weights = counted(MATRICES, 1)[None], mx.array([[0.5, 2.0]])
    combined = matrix.combined(mx.ones((1, ROWS)), x, ids, weights)
    both = (FEWER_TOGETHER, MORE_TOGETHER)
    product = expected * mx.sigmoid(expected) * expected
    rows = CudaMatrix(kind, blocks[0]).lookup(mx.arange(ROWS))
    return {
        "multiply": all(close(matrix.multiplied(x, ids[0], n), expected) for n in both),
        "combined": close(combined, 1 + (expected * weights[0][:, None]).sum(axis=0)[None]),
        "gated": all(close(matrix.gated(matrix, x, ids.reshape(-1, 1), n), product) for n in both),
        "convert": close(rows, values[0]),
    }


def _attention(g: Latents) -> dict[str, bool]:
    # Shifted, so that the largest value of a block is a negative one.
    kv = wave(1, g.width) - 0.25
    queries, norm = wave(1, g.heads * g.query), 1 + wave(g.rank) / 2
    absorbed, past = wave(g.heads, g.rank), mx.array([PAST], mx.int32)
    angles = mx.arange(POSITIONS)[:, None] / mx.arange(1, g.rope // 2 + 1)
    table = mx.stack([mx.cos(angles), mx.sin(angles)])
    row, turned = prepare(g, kv, queries, norm, table, past, EPS)

    latent = kv[:, : g.rank] * mx.rsqrt(mx.square(kv[:, : g.rank]).mean() + EPS) * norm
    key = _turned(kv[:, g.rank :], table[:, PAST])
    ends = _turned(queries.reshape(g.heads, -1)[:, -g.rope :], table[:, PAST])
    cached = mx.concatenate([latent, key], axis=-1)

    old = encoded(wave(RESERVED, g.width), g.type)
    row = row.view(old.dtype)
    rows = mx.slice_update(old, row, past, axes=[0])
    seen = decoded(rows[: PAST + 1], mx.float32)
    query = SCALE * mx.concatenate([absorbed, ends], axis=-1)
    weights = mx.softmax((query[:, None] * seen).sum(axis=-1), axis=-1, precise=True)
    context = (weights[..., None] * seen[:, : g.rank]).sum(axis=1)
    return {
        "prepare": close(decoded(row, mx.float32), cached, ROUNDING[g.type])
        and close(turned, ends),
        "attend": close(attend(g, absorbed, turned, rows, past, SCALE), context),
    }


def _routing(router: Router) -> dict[str, bool]:
    random = np.random.default_rng(0)
    # Scores that lie apart, so that rounding changes no choice.
    steps = np.linspace(-3, 3, router.n_experts, dtype=np.float32)
    logits = mx.array(np.stack([random.permutation(steps) for _ in range(4)]))
    bias = mx.array(random.permutation(steps) / 10)
    equal = mx.zeros((1, router.n_experts))
    first, _ = route(equal, None, router)
    proofs = {"equal scores": bool(mx.all(first == mx.arange(router.top_k)).item())}
    for name, added in (("route", None), ("route with a bias", bias)):
        ids, weights = route(logits, added, router)
        right_ids, right = choose_experts(logits, added, router)
        proofs[name] = bool(mx.all(ids == right_ids).item()) and close(weights, right)
    return proofs


def _turned(x: mx.array, turns: mx.array) -> mx.array:
    """The pairs (2i, 2i + 1) of x [n, 2 * pairs], turned by cosines and sines [2, pairs]."""
    even, odd = x[:, ::2], x[:, 1::2]
    cosine, sine = turns
    turned = mx.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(x.shape)

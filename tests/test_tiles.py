"""Attention where matrix tiles take part, and gate and up read side by side, on every set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf.quants
import layer_oracle as oracle
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GType
from layer_cases import EPS, MLA, OPS, floats, hidden_states, make_mla, norm_weight, rng
from layer_cases import tensor as float_tensor
from test_kernels import INT8_TYPES, quantized_activations, random_blocks

from localds import _native as native
from localds.gguf import GGMLType, Tensor
from localds.memory.latents import LatentCache
from localds.ops import FfnWeights

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=native.available_isas(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = native.isa()
    native.select_isa(request.param)
    yield
    native.select_isa(before)


def test_near_products() -> None:
    """Of floats in two bfloat16 each: 2^-16 of the terms."""
    random = np.random.default_rng(1)
    for m, n, k in [(3, 5, 7), (32, 32, 32), (33, 47, 31), (64, 64, 576), (64, 100, 33)]:
        a, b = (random.normal(size=(rows, k)).astype(np.float32) for rows in (m, n))
        c = random.normal(size=(m, n)).astype(np.float32)
        exact = a.astype(np.float64) @ b.T
        terms = np.abs(a) @ np.abs(b).T
        assert np.all(np.abs(native.gemm_nt(a, b, near=True) - exact) <= 2**-16 * terms)
        product = native.gemm_nn(a, np.ascontiguousarray(b.T), c, near=True)
        assert np.all(np.abs(product - (c + exact)) <= 2**-16 * (terms + np.abs(c)))


@pytest.mark.parametrize("heads", [16, 48])
@pytest.mark.parametrize("rank", [32, 96])
@pytest.mark.parametrize("last", [1, 5])
def test_many_heads_on_a_rounded_cache(heads: int, rank: int, last: int) -> None:
    """Rows are held exactly by what the tiles multiply; the queries to 2^-17."""
    shape = replace(MLA, heads=heads, kv_rank=rank)
    layer, w = make_mla(shape)
    x = hidden_states(rng(), 171)
    cache = LatentCache(1, rank + shape.rope_width, 171, "f16").layers[0]
    past = 171 - last
    y = np.concatenate([layer(x[:past].copy(), cache, 0), layer(x[past:].copy(), cache, past)])
    rows = floats(cache, 171).astype(np.float64)
    expected = oracle.mla(x.astype(np.float64), w, shape, rows)
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


def quantized(kind: GType, rows: int, columns: int, seed: int) -> tuple[Tensor, np.ndarray]:
    raw = random_blocks(np.random.default_rng(seed), kind, rows, columns)
    weights = gguf.quants.dequantize(raw, kind).astype(np.float64)
    data = raw.reshape(-1).view(np.uint8)
    return Tensor("w", GGMLType(int(kind)), (columns, rows), data, 0, Path("test.gguf")), weights


@pytest.mark.parametrize("kind", INT8_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gate_and_up_side_by_side(kind: GType, tokens: int) -> None:
    random = np.random.default_rng(2)
    hidden, width = 256, 77
    gate, gate_weights = quantized(kind, width, hidden, 3)
    up, up_weights = quantized(kind, width, hidden, 4)
    down_weights = random.normal(size=(hidden, width)).astype(np.float32)
    norm = norm_weight(random, hidden)
    weights = FfnWeights(
        norm=float_tensor(norm, "norm"), gate=gate, up=up, down=float_tensor(down_weights, "down")
    )
    x = random.normal(size=(tokens, hidden)).astype(np.float32)
    y = OPS.ffn(weights, EPS)(x.copy())

    wide: Any = x.astype(np.float64)
    inner = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + EPS) * norm
    inner = quantized_activations(inner.astype(np.float32)).astype(np.float64)
    gated, lifted = inner @ gate_weights.T, inner @ up_weights.T
    with np.errstate(over="ignore"):
        expected = gated / (1 + np.exp(-gated)) * lifted @ down_weights.T
    # An activation on the edge between two steps may fall to either side.
    assert np.abs(y - x - expected).max() <= 2e-3 * np.abs(expected).max()

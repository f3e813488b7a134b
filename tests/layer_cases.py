"""Small layers with random weights, as tensors and as plain matrices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf.quants
import numpy as np

from localds.gguf import GGMLType, Tensor
from localds.memory.latents import LatentCache
from localds.ops import (
    GqaShape,
    GqaWeights,
    MlaShape,
    MlaWeights,
    MoeWeights,
    Rope,
)
from localds.ops.cpu import CpuOps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from localds.memory.latents import LayerCache
    from localds.ops import Attention

    Floats = NDArray[np.float32]

EPS = 1e-6
OPS = CpuOps()
HIDDEN = 64


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tensor(values: Floats, name: str = "t", kind: GGMLType = GGMLType.F32) -> Tensor:
    """A tensor of `values` [..., rows, cols]; its GGUF shape is reversed."""
    data = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType(kind))
    flat = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    return Tensor(name, kind, values.shape[::-1], flat, 0, Path("test.gguf"))


def matrix(random: np.random.Generator, *shape: int) -> Floats:
    """Weights that keep the size of what they multiply."""
    return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def norm_weight(random: np.random.Generator, width: int) -> Floats:
    return random.uniform(0.5, 1.5, width).astype(np.float32)


def hidden_states(random: np.random.Generator, n: int) -> Floats:
    return random.standard_normal((n, HIDDEN)).astype(np.float32)


def rope(pairs: int) -> Rope:
    frequencies = 10000.0 ** (-np.arange(pairs) / pairs)
    return Rope(frequencies.astype(np.float32), 1.1)


MLA = MlaShape(
    heads=4,
    nope=16,
    rope_width=8,
    value=24,
    kv_rank=56,
    softmax_scale=0.3,
    eps=EPS,
    latent_eps=0.01,
    rope=rope(4),
)
# All widths are multiples of a Q8_0 block; the cached row is as wide as that of MLA.
BLOCK_MLA = MlaShape(
    heads=4,
    nope=32,
    rope_width=32,
    value=32,
    kv_rank=32,
    softmax_scale=0.3,
    eps=EPS,
    latent_eps=0.01,
    rope=rope(16),
)
GQA = GqaShape(heads=6, kv_heads=2, head=32, softmax_scale=0.25, eps=EPS, rope=rope(12))


def mla_weights(g: MlaShape, q_rank: int = 0, seed: int = 1) -> dict[str, Floats]:
    r = rng(seed)
    queries = g.heads * (g.nope + g.rope_width)
    w = {
        "norm": norm_weight(r, HIDDEN),
        "kv_a": matrix(r, g.kv_rank + g.rope_width, HIDDEN),
        "kv_a_norm": norm_weight(r, g.kv_rank),
        "kv_b": matrix(r, g.heads * (g.nope + g.value), g.kv_rank),
        "output": matrix(r, HIDDEN, g.heads * g.value),
    }
    if q_rank:
        return w | {
            "q_a": matrix(r, q_rank, HIDDEN),
            "q_a_norm": norm_weight(r, q_rank),
            "q_b": matrix(r, queries, q_rank),
        }
    return w | {"q": matrix(r, queries, HIDDEN)}


def mla_tensors(
    w: dict[str, Floats], g: MlaShape, *, legacy: bool, kind: GGMLType = GGMLType.F32
) -> MlaWeights:
    """Prepared as the converter does: kv_b whole, or split and the keys transposed."""
    plain = {
        name: tensor(value, name, GGMLType.F32 if value.ndim == 1 else kind)
        for name, value in w.items()
        if name != "kv_b"
    }
    if legacy:
        return MlaWeights(**plain, kv_b=tensor(w["kv_b"], "kv_b", kind))
    heads = w["kv_b"].reshape(g.heads, g.nope + g.value, g.kv_rank)
    k_b = tensor(heads[:, : g.nope].transpose(0, 2, 1), "k_b", kind)
    return MlaWeights(**plain, k_b=k_b, v_b=tensor(heads[:, g.nope :], "v_b", kind))


def make_mla(
    g: MlaShape = MLA, q_rank: int = 0, *, legacy: bool = False, kind: GGMLType = GGMLType.F32
) -> tuple[Attention[Floats], dict[str, Floats]]:
    w = mla_weights(g, q_rank)
    return OPS.mla(mla_tensors(w, g, legacy=legacy, kind=kind), g), w


def gqa_layer_weights() -> dict[str, Floats]:
    r = rng(2)
    return {
        "norm": norm_weight(r, HIDDEN),
        "q": matrix(r, GQA.heads * GQA.head, HIDDEN),
        "k": matrix(r, GQA.kv_heads * GQA.head, HIDDEN),
        "v": matrix(r, GQA.kv_heads * GQA.head, HIDDEN),
        "output": matrix(r, HIDDEN, GQA.heads * GQA.head),
    }


def make_gqa(kind: GGMLType = GGMLType.F32) -> tuple[Attention[Floats], dict[str, Floats]]:
    w = gqa_layer_weights()
    tensors = {
        name: tensor(value, name, GGMLType.F32 if value.ndim == 1 else kind)
        for name, value in w.items()
    }
    return OPS.gqa(GqaWeights(**tensors), GQA), w


WIDTHS = {"mla": MLA.kv_rank + MLA.rope_width, "gqa": 2 * GQA.kv_heads * GQA.head}


def new_cache(kind: str, capacity: int, cache_type: str = "f32") -> LayerCache:
    cache = LatentCache(1, WIDTHS[kind], capacity, cache_type).layers[0]
    cache.data[:] = 0xAB
    return cache


def floats(cache: LayerCache, rows: int) -> Floats:
    return gguf.quants.dequantize(cache.data[:rows], gguf.GGMLQuantizationType(cache.type))


def moe_weights(experts: int, *, bias: bool, shared: bool, seed: int = 4) -> dict[str, Floats]:
    r = rng(seed)
    w = {
        "norm": norm_weight(r, HIDDEN),
        "router": matrix(r, experts, HIDDEN) * 2,
        "gate": matrix(r, experts, 64, HIDDEN),
        "up": matrix(r, experts, 64, HIDDEN),
        "down": matrix(r, experts, HIDDEN, 64),
    }
    if bias:
        w["router_bias"] = (r.standard_normal(experts) / 4).astype(np.float32)
    if shared:
        w |= {
            "shared_gate": matrix(r, 96, HIDDEN),
            "shared_up": matrix(r, 96, HIDDEN),
            "shared_down": matrix(r, HIDDEN, 96),
        }
    return w


def moe_tensors(
    w: dict[str, Floats], *, fused: bool = False, kind: GGMLType = GGMLType.F32
) -> MoeWeights:
    w = dict(w)
    if fused:
        w["gate_up"] = np.concatenate([w.pop("gate"), w.pop("up")], 1)
    plain = ("norm", "router", "router_bias")
    return MoeWeights(
        **{
            name: tensor(value, name, GGMLType.F32 if name in plain else kind)
            for name, value in w.items()
        }
    )

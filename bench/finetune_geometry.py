"""Models of V2-Lite's proportions with random weights: a quantized GGUF file, mlx-lm's config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from make_large_gguf import BLOCKS, RNG, TILE, tile

NOPE, ROPE, VALUE, SHARED, EPS = 128, 64, 128, 2, 1e-6


@dataclass(frozen=True)
class Geometry:
    """Sizes that differ; heads are as wide as V2-Lite's, and the first layer is dense."""

    hidden: int
    dense: int
    expert: int
    layers: int
    heads: int
    latent: int
    experts: int
    used: int
    vocabulary: int

    def mlx_lm(self) -> dict[str, Any]:
        return {
            "model_type": "deepseek_v2",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense,
            "moe_intermediate_size": self.expert,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_shared_experts": SHARED,
            "n_routed_experts": self.experts,
            "kv_lora_rank": self.latent,
            "q_lora_rank": None,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": VALUE,
            "qk_nope_head_dim": NOPE,
            "topk_method": "greedy",
            "num_experts_per_tok": self.used,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 163840,
            "rms_norm_eps": EPS,
            "rope_scaling": {"factor": 1, "original_max_position_embeddings": 4096},
        }


# Narrow rows that Q4_K's blocks of 256 do not divide become Q5_0, as in V2-Lite itself.
GEOMETRIES = {
    "tiny": Geometry(256, 320, 128, 2, 2, 64, 8, 2, 4096),
    "quarter": Geometry(512, 2752, 384, 4, 4, 128, 16, 6, 25600),
    "v2-lite": Geometry(2048, 10944, 1408, 27, 16, 512, 64, 6, 102400),
}


def write_gguf(out: Path, geometry: Geometry) -> None:
    """Q4_K as llama-quantize's Q4_K_S: the output in Q6_K, latents in Q8_0."""
    writer = gguf.GGUFWriter(out, "deepseek2")
    _add_metadata(writer, geometry)
    wanted = list(_tensors(geometry))
    for name, kind, shape in wanted:
        size = _bytes(kind, shape)
        if kind == Type.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        else:
            stored = (*shape[:-1], _bytes(kind, shape[-1:]))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    tiles = {kind: tile(kind) for kind in BLOCKS}
    with out.open("ab") as file:
        file.write(bytes(-file.tell() % 32))
        for name, kind, shape in wanted:
            size = _bytes(kind, shape)
            if kind == Type.F32:
                data = RNG.standard_normal(shape, np.float32) * 0.02
                file.write(np.ones_like(data) if "norm" in name else data)
            else:
                blocks = np.roll(tiles[kind], int(RNG.integers(TILE)) * BLOCKS[kind][1])
                for start in range(0, size, len(blocks)):
                    file.write(blocks[: size - start])
            file.write(bytes(-size % 32))
        os.fsync(file.fileno())


def _bytes(kind: Type, shape: tuple[int, ...]) -> int:
    elements, nbytes = (1, 4) if kind == Type.F32 else BLOCKS[kind]
    return int(np.prod(shape)) // elements * nbytes


def _tensors(g: Geometry) -> Iterator[tuple[str, Type, tuple[int, ...]]]:
    """Names, types and shapes, the fastest dimension last."""
    yield "token_embd.weight", Type.Q4_K, (g.vocabulary, g.hidden)
    yield "output.weight", Type.Q6_K, (g.vocabulary, g.hidden)
    yield "output_norm.weight", Type.F32, (g.hidden,)
    for i in range(g.layers):
        for name, kind, shape in [*_attention(g), *(_experts(g) if i else _dense(g))]:
            narrow = kind == Type.Q4_K and shape[-1] % 256
            yield f"blk.{i}.{name}.weight", Type.Q5_0 if narrow else kind, shape


def _attention(g: Geometry) -> list[tuple[str, Type, tuple[int, ...]]]:
    return [
        ("attn_norm", Type.F32, (g.hidden,)),
        ("ffn_norm", Type.F32, (g.hidden,)),
        ("attn_kv_a_norm", Type.F32, (g.latent,)),
        ("attn_q", Type.Q4_K, (g.heads * (NOPE + ROPE), g.hidden)),
        ("attn_kv_a_mqa", Type.Q8_0, (g.latent + ROPE, g.hidden)),
        ("attn_k_b", Type.Q8_0, (g.heads, g.latent, NOPE)),
        ("attn_v_b", Type.Q8_0, (g.heads, VALUE, g.latent)),
        ("attn_output", Type.Q4_K, (g.hidden, g.heads * VALUE)),
    ]


def _dense(g: Geometry) -> list[tuple[str, Type, tuple[int, ...]]]:
    return [
        ("ffn_gate", Type.Q4_K, (g.dense, g.hidden)),
        ("ffn_up", Type.Q4_K, (g.dense, g.hidden)),
        ("ffn_down", Type.Q4_K, (g.hidden, g.dense)),
    ]


def _experts(g: Geometry) -> list[tuple[str, Type, tuple[int, ...]]]:
    shared = SHARED * g.expert
    return [
        ("ffn_gate_inp", Type.F32, (g.experts, g.hidden)),
        ("ffn_gate_exps", Type.Q4_K, (g.experts, g.expert, g.hidden)),
        ("ffn_up_exps", Type.Q4_K, (g.experts, g.expert, g.hidden)),
        ("ffn_down_exps", Type.Q4_K, (g.experts, g.hidden, g.expert)),
        ("ffn_gate_shexp", Type.Q4_K, (shared, g.hidden)),
        ("ffn_up_shexp", Type.Q4_K, (shared, g.hidden)),
        ("ffn_down_shexp", Type.Q4_K, (g.hidden, shared)),
    ]


def _add_metadata(writer: gguf.GGUFWriter, g: Geometry) -> None:
    for name, value in {
        "block_count": g.layers,
        "context_length": 163840,
        "embedding_length": g.hidden,
        "feed_forward_length": g.dense,
        "attention.head_count": g.heads,
        "attention.head_count_kv": 1,
        "leading_dense_block_count": 1,
        "vocab_size": g.vocabulary,
        "attention.kv_lora_rank": g.latent,
        "attention.key_length": g.latent + ROPE,
        "attention.value_length": g.latent,
        "attention.key_length_mla": NOPE + ROPE,
        "attention.value_length_mla": VALUE,
        "expert_feed_forward_length": g.expert,
        "expert_count": g.experts,
        "expert_used_count": g.used,
        "expert_shared_count": SHARED,
        "expert_gating_func": 1,
        "rope.dimension_count": ROPE,
    }.items():
        writer.add_uint32(f"deepseek2.{name}", value)
    writer.add_float32("deepseek2.attention.layer_norm_rms_epsilon", EPS)
    writer.add_float32("deepseek2.rope.freq_base", 10000.0)
    writer.add_float32("deepseek2.expert_weights_scale", 1.0)

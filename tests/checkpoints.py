"""Random small checkpoints of every architecture variant, and what tests need to use them.

A variant is a model class of transformers with a config. Its tensors' values are a function of
their names and a seed, so that the golden files hold only config, shapes, ids and logits, and
every machine makes the same weights: they come from the raw stream of PCG64, not from numpy's
distributions, whose streams may change.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from convert.weights import open_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from convert import Checkpoint

GOLDEN = Path(__file__).parent / "golden"

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 20480,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Widths all differ, so that no mix-up of two of them goes unseen.
LATENT = {
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}
EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}


def yarn(mscale: float, factor: float = 40.0, **more: float) -> dict[str, Any]:
    """RoPE parameters whose fast, ramped and slow pairs all turn visibly within a short text."""
    return {
        "rope_type": "yarn",
        "rope_theta": 200.0,
        "factor": factor,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        **more,
    }


@dataclass(frozen=True)
class Variant:
    """A model class of transformers with a config. `shards` and `dtype` say how it is stored."""

    model_class: str
    config: dict[str, Any]
    pre: str
    shards: int = 1
    dtype: str = "F32"
    seed: int = 1
    tokens: int = field(default=72)


def _v2(**config: Any) -> dict[str, Any]:
    return {**SIZES, **LATENT, **EXPERTS, "q_lora_rank": None, **config}


def _v3(**config: Any) -> dict[str, Any]:
    sizes = {**SIZES, **LATENT, **EXPERTS, "n_shared_experts": 1}
    grouped = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "q_lora_rank": 56}
    return {**sizes, **grouped, "routed_scaling_factor": 2.5, **config}


VARIANTS = {
    # DeepSeek-V2-Lite: no query rank, greedy softmax routing, YaRN with its mscale rule.
    "v2-lite": Variant("DeepseekV2", _v2(rope_parameters=yarn(0.707)), "deepseek-llm"),
    # DeepSeek-V2 and V2.5: query rank, groups scored by their best expert, scaled weights.
    "v2": Variant(
        "DeepseekV2",
        _v2(
            q_lora_rank=56,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
            rope_parameters=yarn(0.707),
        ),
        "deepseek-llm",
        dtype="BF16",
    ),
    "v2-dense": Variant("DeepseekV2", _v2(first_k_dense_replace=3), "deepseek-llm", dtype="F16"),
    "v2-tied": Variant("DeepseekV2", _v2(tie_word_embeddings=True), "deepseek-llm"),
    # DeepSeek-V3, R1 and V3.1: biased sigmoid routing, groups scored by their best two.
    "v3": Variant(
        "DeepseekV3", _v3(rope_parameters=yarn(1.0)), "deepseek-v3", shards=3, dtype="BF16"
    ),
    # Kimi-K2: one group, and YaRN bounds that make the ramp a step.
    "kimi-k2": Variant(
        "DeepseekV3",
        _v3(
            n_group=1,
            topk_group=1,
            n_routed_experts=12,
            num_experts_per_tok=4,
            routed_scaling_factor=2.827,
            rope_parameters=yarn(1.0, factor=32.0, beta_fast=1.0),
        ),
        "kimi-k2",
    ),
    # Moonlight: V3 routing without query rank; 27 layers as the original, which llama.cpp asks for.
    "moonlight": Variant(
        "DeepseekV3",
        _v3(
            num_hidden_layers=27,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=32,
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            n_shared_experts=2,
            routed_scaling_factor=2.446,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        ),
        "kimi-k2",
    ),
    "glm-4.7-flash": Variant(
        "Glm4MoeLite",
        {
            **_v3(n_group=1, topk_group=1, routed_scaling_factor=1.8, rms_norm_eps=1e-5),
            "qk_nope_head_dim": 40,
            "v_head_dim": 56,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "glm4",
    ),
    # Youtu-LLM: latent attention over dense layers, tied embeddings.
    "youtu": Variant(
        "Youtu",
        {
            **SIZES,
            **LATENT,
            "q_lora_rank": 56,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1600000.0},
        },
        "youtu",
        dtype="BF16",
    ),
    "mixtral": Variant(
        "Mixtral",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tekken",
        shards=2,
        dtype="F16",
    ),
    # Mixtral with a head width of its own, and an epsilon that shows.
    "mixtral-wide": Variant(
        "Mixtral",
        {
            **SIZES,
            "num_key_value_heads": 1,
            "num_local_experts": 8,
            "head_dim": 24,
            "rms_norm_eps": 0.01,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tekken",
    ),
}


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Deterministic values in [-1, 1), 24 bits each."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    raw = np.random.PCG64(int.from_bytes(key, "little")).random_raw(math.prod(shape))
    return ((raw >> 40).astype(np.float32) / np.float32(1 << 23) - 1).reshape(shape)


def weight(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A tensor's values: of a size that keeps attention, routing and logits far from flat.

    They are rounded to 8 bits of precision, so that F32, F16 and BF16 all hold them exactly.
    """
    values = uniform(seed, name, shape)
    if "norm" in name:
        values = 1 + values / 2
    elif name.endswith("e_score_correction_bias"):
        values = values / 4
    elif "embed_tokens" not in name:
        damped = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
        values = values * np.float32((1.0 if damped else 2.5) / math.sqrt(shape[-1]))
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def token_ids(seed: int, count: int) -> list[int]:
    """Deterministic ids, all over the vocabulary."""
    return [int(id_) for id_ in (uniform(seed, "ids", (count,)) + 1) / 2 * VOCABULARY]


def golden_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, as transformers saves them."""
    shapes = json.loads((GOLDEN / name / "tensors.json").read_text())
    return {tensor: tuple(shape) for tensor, shape in shapes.items()}


def golden_config(name: str) -> dict[str, Any]:
    """The config.json that transformers saves for a variant."""
    config: dict[str, Any] = json.loads((GOLDEN / name / "config.json").read_text())
    return config


def make_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, NDArray[np.float32]]:
    """All tensors of a checkpoint."""
    return {name: weight(seed, name, shape) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, NDArray[np.float32]],
    shards: int = 1,
    dtype: str = "F32",
) -> Path:
    """Write a checkpoint folder as published ones look, tokenizer included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer()))
    stored = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    # Routers' biases stay in F32, as in the published checkpoints.
    tensors = {
        name: data if name.endswith("correction_bias") else data.astype(stored)
        for name, data in weights.items()
    }
    save_shards(folder, tensors, shards)
    return folder


def save_shards(folder: Path, tensors: Mapping[str, NDArray[Any]], shards: int = 1) -> None:
    """Write tensors as they are, in one file or in several and an index."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[index::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_json = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_json)


def write_variant(name: str, folder: Path, **changes: Any) -> Path:
    """Write the golden checkpoint of a variant, with changes to its config."""
    variant = VARIANTS[name]
    weights = make_weights(golden_shapes(name), variant.seed)
    config = golden_config(name) | changes
    return write_checkpoint(folder, config, weights, variant.shards, variant.dtype)


def read_weight(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """A whole weight, as the converter reads it."""
    shape = checkpoint.find(name).shape
    matrices, rows = (1, 1, 1, *shape)[-3:-1]
    weight = open_weight(checkpoint, name, shape)
    return np.stack([weight.read(i, 0, rows) for i in range(matrices)]).reshape(shape)


SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n")]


def byte_alphabet() -> list[str]:
    """The characters that stand for bytes 0 to 255 in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}


def added_token(index: int, text: str, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens in tokenizer.json, special and normalized unless said otherwise."""
    matching = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "id": index,
        "content": text,
        "special": True,
        "normalized": True,
        **matching,
        **flags,
    }


def tiny_tokenizer() -> dict[str, Any]:
    """The content of a tokenizer.json: specials, all bytes and a few merges."""
    tokens = [*SPECIALS, *byte_alphabet(), *(left + right for left, right in MERGES)]
    return {
        "version": "1.0",
        "added_tokens": [added_token(index, token) for index, token in enumerate(SPECIALS)],
        "pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": False},
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [[left, right] for left, right in MERGES],
        },
    }

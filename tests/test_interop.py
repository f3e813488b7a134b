"""The same quantized files in llama.cpp: greedy continuations and next-token distributions.

Models are random, but behave as real ones: each block adds little to the hidden state, and the
distributions are peaked. Needs LOCALDS_LLAMA_CPP (see tests/llama_cpp.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoints import (
    EXPERTS,
    SIZES,
    SPECIALS,
    VOCABULARY,
    uniform,
    write_checkpoint,
    yarn,
)
from derive_gguf import fused_gate_up, legacy_kv_b
from divergence import mean_kl
from llama_cpp import LlamaCpp, find_llama_cpp

import localds
from convert import convert_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.interop

GENERATE = 64
NEAR_TIE = 1e-2
MEAN_KL = 1e-3

# Row lengths of 256 wherever real models have multiples of it, so that the K-quants apply; k_b's
# rows are shorter and take the fallback types, as in real files.
WIDE = {
    **SIZES,
    "hidden_size": 256,
    "intermediate_size": 512,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "moe_intermediate_size": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # llama.cpp takes files without a query rank only with 26 or 27 layers.
    "v2-lite": (
        "DeepseekV2ForCausalLM",
        {
            **EXPERTS,
            **WIDE,
            "num_hidden_layers": 26,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "rope_parameters": yarn(0.707),
        },
    ),
    "v3": (
        "DeepseekV3ForCausalLM",
        {
            **EXPERTS,
            **WIDE,
            "num_hidden_layers": 8,
            "q_lora_rank": 256,
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": yarn(1.0),
        },
    ),
    # Dense layers of latent attention.
    "youtu": (
        "YoutuForCausalLM",
        {
            **{key: value for key, value in WIDE.items() if key != "moe_intermediate_size"},
            "num_hidden_layers": 8,
            "q_lora_rank": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1600000.0},
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {
            **SIZES,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_key_value_heads": 2,
            "num_hidden_layers": 12,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
K_QUANTS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")
FLAT = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4_MOE")
PRESETS = {
    "v2-lite": (*K_QUANTS, *FLAT),
    "v3": ("Q8_0", "Q4_K_M", "Q6_K", "Q2_K"),
    "youtu": ("Q8_0", "Q4_K_M"),
    "mixtral": ("Q8_0", "Q4_K_M", "Q6_K", "Q2_K"),
}
# Other forms of the V3 model's file.
DERIVED = {"v3, legacy kv_b": "v3", "v3, fused gate_up": "v3"}
PRESETS |= dict.fromkeys(DERIVED, ("Q8_0", "Q4_K_M"))
CASES = [(name, preset) for name, presets in PRESETS.items() for preset in presets]

# The tokens of a text, a byte each (the first tokens of the tiny vocabulary).
TEXT = (Path(__file__).parent.parent / "LICENSE").read_bytes()[:384]
IDS = [0, *(len(SPECIALS) + byte for byte in TEXT)]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    hidden = config["hidden_size"]
    result: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    layer_shapes = latent_layer if "kv_lora_rank" in config else mixtral_layer
    for layer in range(config["num_hidden_layers"]):
        tensors = layer_shapes(config, layer)
        tensors |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        for name, shape in tensors.items():
            suffix = "" if name.endswith("bias") else ".weight"
            result[f"model.layers.{layer}.{name}{suffix}"] = shape
    return result


def latent_layer(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, rank = config["v_head_dim"], config["kv_lora_rank"]
    q_rank, experts = config.get("q_lora_rank"), config.get("n_routed_experts", 0)
    tensors: dict[str, tuple[int, ...]] = {
        "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
        "self_attn.kv_a_layernorm": (rank,),
        "self_attn.kv_b_proj": (heads * (nope + value), rank),
        "self_attn.o_proj": (hidden, heads * value),
    }
    if q_rank:
        tensors["self_attn.q_a_proj"] = (q_rank, hidden)
        tensors["self_attn.q_a_layernorm"] = (q_rank,)
        tensors["self_attn.q_b_proj"] = (heads * (nope + rope), q_rank)
    else:
        tensors["self_attn.q_proj"] = (heads * (nope + rope), hidden)
    if not experts or layer < config["first_k_dense_replace"]:
        return tensors | swiglu("mlp.", hidden, config["intermediate_size"])
    width = config["moe_intermediate_size"]
    tensors["mlp.gate"] = (experts, hidden)
    if "n_group" in config:
        tensors["mlp.gate.e_score_correction_bias"] = (experts,)
    for index in range(experts):
        tensors |= swiglu(f"mlp.experts.{index}.", hidden, width)
    return tensors | swiglu("mlp.shared_experts.", hidden, width * config["n_shared_experts"])


def mixtral_layer(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:  # noqa: ARG001
    hidden, width = config["hidden_size"], config["intermediate_size"]
    kv_width = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "block_sparse_moe.gate": (config["num_local_experts"], hidden),
    }
    for index in range(config["num_local_experts"]):
        expert = f"block_sparse_moe.experts.{index}."
        tensors |= {expert + "w1": (width, hidden), expert + "w3": (width, hidden)}
        tensors[expert + "w2"] = (hidden, width)
    return tensors


def swiglu(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj": (width, hidden),
        prefix + "up_proj": (width, hidden),
        prefix + "down_proj": (hidden, width),
    }


# Attention and experts take visible part, but rounding grows as slowly as in trained models: with
# larger outputs of blocks, exact and rounded arithmetic part within a few layers in any program.
GAINS = {"o_proj": 0.2, "down_proj": 0.1, "w2": 0.1, "gate": 2.0, "lm_head": 2.0}


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Values of a tensor: small outputs of blocks, and a head that prefers one successor.

    Trained models are sure of most tokens. Logits of a purely random head would have their best
    two within rounding every few tokens, and greedy texts could not be compared.
    """
    values = uniform(1, name, shape)
    if "norm" in name:
        return 1 + values / 4
    if name.endswith("e_score_correction_bias"):
        return values / 4
    if name == "model.embed_tokens.weight":
        return values
    kind = name.removesuffix(".weight").rpartition(".")[2]
    values = values * np.float32(GAINS.get(kind, 1.5) / np.sqrt(shape[-1]))
    if kind == "lm_head":
        order = np.argsort(uniform(1, "order", shape[:1]))
        embeddings = weight("model.embed_tokens.weight", shape)
        values[np.roll(order, -1)] += np.float32(0.8 / np.sqrt(shape[-1])) * embeddings[order]
    return values


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return find_llama_cpp(tmp_path_factory.mktemp("llama_cpp"))


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The models as F32 files, each made once."""
    folder = tmp_path_factory.mktemp("interop")

    @cache
    def make(name: str) -> Path:
        if name in DERIVED:
            return derive(name, make(DERIVED[name]), folder / f"{name}.gguf")
        architecture, values = MODELS[name]
        config = {**values, "architectures": [architecture]}
        weights = {tensor: weight(tensor, shape) for tensor, shape in shapes(config).items()}
        write_checkpoint(folder / name, config, weights)
        convert_checkpoint(folder / name, folder / f"{name}.gguf", pre="deepseek-llm")
        (folder / name / "model.safetensors").unlink()
        return folder / f"{name}.gguf"

    return make


def derive(name: str, source: Path, target: Path) -> Path:
    if name.endswith("fused gate_up"):
        return fused_gate_up(source, target)
    config = MODELS[DERIVED[name]][1]
    kv_b = latent_layer(config, 0)["self_attn.kv_b_proj"]
    names = [
        f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        for layer in range(config["num_hidden_layers"])
    ]
    return legacy_kv_b(source, target, config, {name: weight(name, kv_b) for name in names})


@dataclass(frozen=True)
class Comparison:
    """Logits [n_tokens, n_vocab] after IDS and llama.cpp's greedy continuation of them."""

    theirs: NDArray[np.float32]
    ours: NDArray[np.float32]
    exact: NDArray[np.float32]


@pytest.fixture(scope="module")
def compare(
    llama_cpp: LlamaCpp,
    full_precision: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Comparison]:
    """Logits of a model in a preset from both programs, each computed once.

    Exact ones come from the same file, turned back into float32 by llama.cpp.
    """
    folder = tmp_path_factory.mktemp("presets")

    @cache
    def make(name: str, preset: str) -> Comparison:
        path = llama_cpp.quantize(full_precision(name), folder / f"{name}-{preset}.gguf", preset)
        theirs = llama_cpp.logits(path, IDS, GENERATE, VOCABULARY)
        greedy = theirs[len(IDS) - 1 : -1].argmax(axis=1).tolist()
        with localds.load(path) as model:
            session = model.session(context=len(IDS) + GENERATE)
            prefill = session.evaluate(IDS, all_logits=True)
            decode = [session.evaluate([token])[0] for token in greedy]
        exact_path = llama_cpp.quantize(path, folder / "exact.gguf", "F32")
        with localds.load(exact_path) as model:
            exact = model.logits([*IDS, *greedy])
        path.unlink()
        return Comparison(theirs, np.concatenate([prefill, np.stack(decode)]), exact)

    return make


Compare = Callable[[str, str], Comparison]


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_greedy_continuation(compare: Compare, name: str, preset: str) -> None:
    logits = compare(name, preset)
    ours, theirs = logits.ours[len(IDS) - 1 :], logits.theirs[len(IDS) - 1 :]
    top_two = np.sort(theirs, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > NEAR_TIE
    assert clear.sum() > GENERATE / 2
    np.testing.assert_array_equal(ours.argmax(axis=1)[clear], theirs.argmax(axis=1)[clear])


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_next_token_distributions(compare: Compare, name: str, preset: str) -> None:
    logits = compare(name, preset)
    assert mean_kl(logits.theirs, logits.ours) < MEAN_KL


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_as_exact_as_llama_cpp(compare: Compare, name: str, preset: str) -> None:
    """Rounding of activations and cache costs about what it costs there, far below `MEAN_KL`."""
    logits = compare(name, preset)
    our_error, their_error = (
        mean_kl(logits.exact, logits.ours),
        mean_kl(logits.exact, logits.theirs),
    )
    print(
        f"{name} {preset}: KL of exact to ours {our_error:.1e}, to theirs {their_error:.1e}, "
        f"of theirs to ours {mean_kl(logits.theirs, logits.ours):.1e}"
    )
    assert our_error < 2 * their_error

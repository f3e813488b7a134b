"""Kimi's vocabulary: tiktoken.model holds ranks, merges follow from them."""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from convert.config import CheckpointError, read_json
from localds.encoders import BYTE_LETTERS
from localds.vocabulary import TokenType

if TYPE_CHECKING:
    from pathlib import Path

    from convert.source import Value

RESERVED = 256
"""Special tokens that follow the ranks; those without a name are reserved."""


def read_ranks(folder: Path, size: int) -> dict[str, Value]:
    """Read tiktoken.model and tokenizer_config.json, padded with unused tokens up to `size`.

    Raises `CheckpointError` if a file is missing or damaged, or there are more tokens than `size`.
    """
    path = folder / "tiktoken.model"
    ranks = _parse(path)
    texts = {rank: _spell(token) for token, rank in ranks.items()}
    special = _special_tokens(folder, len(ranks))
    texts |= special
    if max(texts) >= size:
        raise CheckpointError(f"{path}: token id {max(texts)} is beyond vocab_size {size}")
    kinds = [
        TokenType.CONTROL
        if index in special
        else TokenType.NORMAL
        if index in texts
        else TokenType.UNUSED
        for index in range(size)
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [texts.get(index, f"[PAD{index}]") for index in range(size)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [
            " ".join(map(_spell, pair))
            for token, rank in ranks.items()
            if (pair := _last_merge(ranks, token, rank))
        ],
    }


def _parse(path: Path) -> dict[bytes, int]:
    """The lines `base64(token) rank` of a tiktoken file."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(f"{path}: line {number} is no token with its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: ranks do not count up from 0; the file is damaged")
    return ranks


def _special_tokens(folder: Path, first: int) -> dict[int, str]:
    """The tokens after the ranks, by id. `first` is the first of them."""
    settings = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    names = {int(index): str(token["content"]) for index, token in settings.items()}
    ids = range(first, first + RESERVED)
    return {index: names.get(index, f"<|reserved_token_{index}|>") for index in ids}


def _last_merge(ranks: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes] | None:
    """The two tokens that make `token`: what is left when all lower-ranked merges are done."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= rank:
            return None
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _spell(token: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in token)

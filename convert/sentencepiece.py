"""SentencePiece vocabularies: from tokenizer.model, or from a tokenizer.json made of one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.config import CheckpointError, read_json
from localds.vocabulary import TokenType

if TYPE_CHECKING:
    from pathlib import Path

    from sentencepiece import SentencePieceProcessor

    from convert.source import Value

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0


class _Table:
    """Tokens, scores and types of `size` tokens, unused ones at first."""

    def __init__(self, size: int) -> None:
        self.texts = [f"[PAD{index}]" for index in range(size)]
        self.scores = np.full(size, UNUSED_SCORE, np.float32)
        self.types = np.full(size, TokenType.UNUSED, np.int32)

    def put(self, index: int, text: str, score: float, kind: TokenType, path: Path) -> None:
        """Set one token. Raises `CheckpointError` if there is no room for it."""
        if not 0 <= index < len(self.texts):
            raise CheckpointError(
                f"{path}: token {text!r} has id {index}, beyond vocab_size {len(self.texts)}"
            )
        self.texts[index], self.scores[index], self.types[index] = text, score, kind

    def metadata(self) -> dict[str, Value]:
        """The table as `tokenizer.ggml.*` keys."""
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": self.texts,
            "tokenizer.ggml.scores": self.scores,
            "tokenizer.ggml.token_type": self.types,
        }


def read_model(folder: Path, size: int) -> dict[str, Value]:
    """Read tokenizer.model and what was added to it, padded with unused tokens up to `size`.

    Raises `CheckpointError` if it is damaged or has more tokens than `size`.
    """
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error})") from None
    table = _Table(size)
    for index in range(processor.vocab_size()):
        piece, score = processor.IdToPiece(index), processor.GetScore(index)
        table.put(index, piece, score, _kind(processor, index), path)
    extra = folder / "added_tokens.json"
    for text, index in (read_json(extra) if extra.is_file() else {}).items():
        table.put(int(index), text, ADDED_SCORE, TokenType.USER_DEFINED, extra)
    settings = folder / "tokenizer_config.json"
    added = read_json(settings).get("added_tokens_decoder", {}) if settings.is_file() else {}
    for index, token in added.items():
        text, kind = added_token(token)
        table.put(int(index), text, ADDED_SCORE, kind, settings)
    return table.metadata()


def read_fallback_model(folder: Path, tokenizer: dict[str, Any], size: int) -> dict[str, Value]:
    """Read a tokenizer.json with byte fallback, which has merges in place of scores.

    A token's score is the negative rank of the first merge that makes it, as in the SentencePiece
    model that such a file is made of: a runtime merges by score.
    """
    path = folder / "tokenizer.json"
    table = _Table(size)
    model = tokenizer["model"]
    ranks = _ranks(model["merges"])
    for text, index in model["vocab"].items():
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        table.put(int(index), text, -float(ranks.get(text, len(ranks))), kind, path)
    for token in tokenizer.get("added_tokens", []):
        text, kind = added_token(token)
        if not _BYTE.fullmatch(text):
            table.put(int(token["id"]), text, ADDED_SCORE, kind, path)
    return table.metadata()


def added_token(token: dict[str, Any]) -> tuple[str, TokenType]:
    """Text and type of a token that was added to a vocabulary.

    Tokens in `<|...|>` act as control tokens even where the file does not say so.
    """
    text = str(token["content"])
    if token.get("special") or _looks_special(text):
        return text, TokenType.CONTROL
    return text.replace(_SPACE, " "), TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    shapes = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    named = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return text in named or any(text.startswith(a) and text.endswith(b) for a, b in shapes)


def _kind(processor: SentencePieceProcessor, index: int) -> TokenType:
    if processor.IsUnknown(index):
        return TokenType.UNKNOWN
    if processor.IsControl(index):
        return TokenType.CONTROL
    if processor.IsUnused(index):
        return TokenType.UNUSED
    return TokenType.BYTE if processor.IsByte(index) else TokenType.NORMAL


def _ranks(merges: list[Any]) -> dict[str, int]:
    """The order in which tokens are first made by a merge."""
    made = (
        merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges
    )
    return {text: rank for rank, text in enumerate(dict.fromkeys(made))}

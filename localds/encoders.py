"""The two ways of turning plain text into ids and ids into bytes: byte-level BPE, SentencePiece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from localds.pretokenizers import SPLITTINGS
from localds.sentencepiece_model import serialize
from localds.vocabulary import TokenizerError, TokenType, Vocabulary

if TYPE_CHECKING:
    from tokenizers.models import BPE

    from localds.gguf.metadata import TypedMetadata

_SPACE = "\u2581"  # SentencePiece's stand-in for the space


class Encoder(Protocol):
    """What `Tokenizer` needs of a kind of vocabulary.

    `add_bos` holds where the file does not say. `starts_with_space`: whether encoding puts a space
    before the text, which decoding has to take away.
    """

    vocabulary: Vocabulary
    add_bos: bool
    starts_with_space: bool

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, which may spell out special tokens: they mean nothing here."""

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 of a token, a character possibly cut."""

    def match_text(self, token: int) -> str:
        """The text that stands for a user-defined or control token."""


class BytePairEncoder:
    """Byte-level BPE: `tokenizer.ggml.model` is gpt2."""

    starts_with_space = False

    def __init__(self, gguf: TypedMetadata) -> None:
        from tokenizers import Tokenizer

        name = gguf.text("tokenizer.ggml.pre")
        splitting = SPLITTINGS.get(name)
        if splitting is None:
            raise TokenizerError(
                f"tokenizer.ggml.pre is {name!r}, a way of splitting text that localds does not "
                f"know; it knows {', '.join(SPLITTINGS)}"
            )
        self.vocabulary = Vocabulary.from_gguf(gguf, {})
        self.add_bos = splitting.add_bos
        self._tokenizer = Tokenizer(_build_bpe(gguf, self.vocabulary, splitting.whole_pieces))
        self._tokenizer.pre_tokenizer = splitting.build()
        self._absent = {i for i, char in enumerate(BYTE_LETTERS) if char not in self.vocabulary.ids}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Raises `TokenizerError` where the vocabulary lacks a byte."""
        # The library would leave such a byte out without a word.
        if self._absent and not self._absent.isdisjoint(text.encode()):
            byte = min(self._absent.intersection(text.encode()))
            raise TokenizerError(
                f"the vocabulary has no token for the byte 0x{byte:02x} in {text[:40]!r}; "
                "the file's vocabulary is incomplete"
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 of a token, a character possibly cut."""
        text = self.vocabulary.texts[token]
        kind = self.vocabulary.types[token]
        if kind == TokenType.UNUSED:
            return b""
        if kind not in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
            try:
                return bytes([_BYTE_OF[char] for char in text])
            except KeyError:
                pass  # not written in GPT-2's alphabet, hence meant as it stands
        return text.encode("utf-8", "surrogateescape")

    def match_text(self, token: int) -> str:
        """The text that stands for a user-defined or control token."""
        return self.vocabulary.texts[token]


class SentencePieceEncoder:
    """SentencePiece BPE: `tokenizer.ggml.model` is llama."""

    add_bos = True

    def __init__(self, gguf: TypedMetadata) -> None:
        from sentencepiece import SentencePieceProcessor

        self.vocabulary = Vocabulary.from_gguf(gguf, {"bos": 1, "eos": 2, "unknown": 0})
        vocabulary = self.vocabulary
        self.starts_with_space = gguf.flag("tokenizer.ggml.add_space_prefix", True)
        types = [kind or TokenType.NORMAL for kind in vocabulary.types]
        if TokenType.UNKNOWN not in types and vocabulary.unknown is not None:
            types[vocabulary.unknown] = TokenType.UNKNOWN
        model = serialize(
            [text.encode("utf-8", "surrogateescape") for text in vocabulary.texts],
            _read_scores(gguf, len(types)),
            types,
            byte_fallback=TokenType.BYTE in types,
            add_dummy_prefix=self.starts_with_space,
        )
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise TokenizerError(f"SentencePiece refuses the file's vocabulary: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with a space put before it where the model wants one."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 of a token, a character possibly cut."""
        text = self.vocabulary.texts[token]
        kind = self.vocabulary.types[token]
        if kind == TokenType.UNUSED:
            return b""
        if kind == TokenType.BYTE:
            return _byte_piece(text)
        if kind != TokenType.CONTROL:
            text = text.replace(_SPACE, " ")
        return text.encode("utf-8", "surrogateescape")

    def match_text(self, token: int) -> str:
        """The text that stands for a user-defined or control token."""
        text = self.vocabulary.texts[token]
        is_text = self.vocabulary.types[token] == TokenType.USER_DEFINED
        return text.replace(_SPACE, " ") if is_text else text


def _gpt2_alphabet() -> list[str]:
    """GPT-2's character for each byte: itself where printable, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_LETTERS = _gpt2_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(BYTE_LETTERS)}


def _build_bpe(gguf: TypedMetadata, vocabulary: Vocabulary, whole_pieces: bool) -> BPE:
    from tokenizers.models import BPE

    written = gguf.strings("tokenizer.ggml.merges", None)
    ids = vocabulary.ids
    if whole_pieces:
        # A text that spells out a special token must not become it as a whole piece.
        ids = vocabulary.of_types([TokenType.NORMAL])
    if written is None and not whole_pieces:
        raise TokenizerError("tokenizer.ggml.merges is missing: convert the checkpoint again")
    merges = _merges_by_rank(ids) if written is None else [_pair(merge) for merge in written]
    if whole_pieces:
        made = (left + right for left, right in merges)
        ids |= {text: vocabulary.ids[text] for text in made if text in vocabulary.ids}
    try:
        return BPE(ids, merges, ignore_merges=whole_pieces)
    except Exception as error:  # the library has no exception of its own
        raise TokenizerError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from None


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise TokenizerError(
            f"tokenizer.ggml.merges holds {merge!r}; a merge is two pieces with a space between"
        )
    return left, right


def _merges_by_rank(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Merges of a vocabulary, in order of id, whose ids are ranks, as tiktoken uses it.

    It joins whichever neighbours make the lowest-ranked token, so every split of a token into two
    tokens is a merge of that token's rank.
    """
    return [
        (text[:cut], text[cut:])
        for text in ids
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]


def _read_scores(gguf: TypedMetadata, count: int) -> list[float]:
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) < count:
        raise TokenizerError(
            f"tokenizer.ggml.scores is missing or shorter than the {count} tokens, which "
            "SentencePiece needs; convert the checkpoint again"
        )
    if not np.isfinite(scores[:count]).all():
        raise TokenizerError("tokenizer.ggml.scores holds a value that is not finite")
    values: list[float] = scores[:count].astype(np.float32).tolist()
    return values


def _byte_piece(text: str) -> bytes:
    """The byte of a piece such as <0x0A>; SentencePiece has checked that it is one."""
    return bytes([int(text[3:-1], 16)])

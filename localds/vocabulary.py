"""The tokens of a GGUF file: their texts, kinds and special roles."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from localds.thinking import THINK_TAGS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from localds.gguf.metadata import TypedMetadata

# Tokens that end a turn without being named by a key of the file: Kimi, GLM, Mistral and others
# have more than one, and converters write only the first.
_TURN_ENDS = frozenset(
    {
        *("<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
        *("<|EOT|>", "[EOT]", "[EOS]", "<end_of_turn>", "<|user|>", "<|observation|>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
_SHOWN_TAGS = frozenset(tag for pair in THINK_TAGS for tag in pair)


class TokenizerError(ValueError):
    """A vocabulary that cannot be used, or a token or text that it cannot express."""


class TokenType(IntEnum):
    """Kinds of tokens, with GGUF's numbers, which are also SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`texts` and `types` by id, `ids` by text. `turn_ends` are the ids that end a reply."""

    texts: list[str]
    types: list[int]
    ids: dict[str, int]
    bos: int | None
    eos: int | None
    unknown: int | None
    turn_ends: frozenset[int]

    @classmethod
    def from_gguf(cls, gguf: TypedMetadata, default_ids: dict[str, int]) -> Self:
        """Read and check the tokens; `default_ids` are special ids where the file has none.

        Raises `TokenizerError`, and `GGUFError` for keys that are missing or of the wrong kind.
        """
        texts = gguf.strings("tokenizer.ggml.tokens")
        ids = {text: i for i, text in enumerate(texts)}
        if not texts:
            raise TokenizerError("tokenizer.ggml.tokens is empty: the file has no vocabulary")
        if len(ids) < len(texts):
            twice = next(i for i, text in enumerate(texts) if ids[text] != i)
            raise TokenizerError(
                f"tokenizer.ggml.tokens: tokens {twice} and {ids[texts[twice]]} are both "
                f"{texts[twice]!r}; the file was converted wrongly"
            )
        types = _read_types(gguf, len(texts))
        special = {
            role: _special_id(gguf, role, len(texts), default_ids.get(role))
            for role in ("bos", "eos", "eot", "eom", "unknown")
        }
        named = (special[role] for role in ("eos", "eot", "eom"))
        control = (
            ids[text]
            for text in _TURN_ENDS
            if text in ids and types[ids[text]] == TokenType.CONTROL
        )
        ends = frozenset(i for i in (*named, *control) if i is not None)
        return cls(texts, types, ids, special["bos"], special["eos"], special["unknown"], ends)

    def of_types(self, wanted: Iterable[TokenType]) -> dict[str, int]:
        """Ids by text of all tokens of the `wanted` types, but for empty texts."""
        kinds = frozenset(wanted)
        texts = self.texts
        return {texts[i]: i for i, kind in enumerate(self.types) if kind in kinds and texts[i]}

    def is_hidden(self, token: int) -> bool:
        """Whether the token is no part of the text: control and unknown, but for think tags.

        Some models spell think tags with control tokens; they are what tells thinking from answer.
        """
        kind = self.types[token]
        return kind in (TokenType.CONTROL, TokenType.UNKNOWN) and (
            self.texts[token] not in _SHOWN_TAGS
        )


def _read_types(gguf: TypedMetadata, count: int) -> list[int]:
    types = gguf.integers("tokenizer.ggml.token_type", None)
    if types is None:
        return [TokenType.NORMAL.value] * count
    if len(types) < count:
        raise TokenizerError(
            f"tokenizer.ggml.token_type has {len(types)} items for {count} tokens; "
            "the file was converted wrongly"
        )
    unknown = set(types) - {kind.value for kind in TokenType} - {0}
    if unknown:
        raise TokenizerError(
            f"tokenizer.ggml.token_type holds {min(unknown)}; types 1 to 6 are known"
        )
    return types[:count]


def _special_id(gguf: TypedMetadata, role: str, count: int, default: int | None) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    token = gguf.integer(key, default)
    if token is not None and not 0 <= token < count:
        raise TokenizerError(f"{key} is {token}, beyond the {count} tokens of the vocabulary")
    return token

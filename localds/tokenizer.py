"""Text to token ids and back, as the vocabulary in a GGUF file says."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from localds.encoders import BytePairEncoder, Encoder, SentencePieceEncoder
from localds.vocabulary import TokenizerError, TokenType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from localds.gguf.metadata import TypedMetadata

__all__ = ["TextStream", "Tokenizer", "TokenizerError"]

_ENCODERS: dict[str, Callable[[TypedMetadata], Encoder]] = {
    "gpt2": BytePairEncoder,
    "llama": SentencePieceEncoder,
}


class Tokenizer:
    """A vocabulary in use. Safe to share between threads.

    `bos_id` may be None; `add_bos` says whether a text begins with it. `eos_ids` are the ids that
    end a reply, `n_vocab` the number of tokens. `special_texts` are the texts of control tokens,
    which stand for them only where `encode` is told so.
    """

    def __init__(self, encoder: Encoder, *, add_bos: bool) -> None:
        vocabulary = encoder.vocabulary
        self._encoder = encoder
        self._vocabulary = vocabulary
        self.n_vocab = len(vocabulary.texts)
        self.bos_id = vocabulary.bos
        self.eos_ids = vocabulary.turn_ends
        self.add_bos = add_bos and vocabulary.bos is not None
        always = self._match_texts(TokenType.USER_DEFINED)
        special = self._match_texts(TokenType.CONTROL, TokenType.UNKNOWN)
        self.special_texts = tuple(special)
        self._always = _TokenFinder(always)
        self._all = _TokenFinder(always | special)

    @classmethod
    def from_gguf(cls, gguf: TypedMetadata) -> Self:
        """Build the tokenizer of a model file.

        Raises `TokenizerError` for a vocabulary that is of an unknown kind or makes no sense, and
        `GGUFError` for keys that are missing or of the wrong kind.
        """
        model = gguf.text("tokenizer.ggml.model")
        build = _ENCODERS.get(model)
        if build is None:
            raise TokenizerError(
                f"tokenizer.ggml.model is {model!r}; localds knows {', '.join(_ENCODERS)}"
            )
        encoder = build(gguf)
        return cls(encoder, add_bos=gguf.flag("tokenizer.ggml.add_bos_token", encoder.add_bos))

    @property
    def bos_text(self) -> str:
        """Text of the bos token; empty where there is none."""
        return "" if self.bos_id is None else self.token_text(self.bos_id)

    @property
    def eos_text(self) -> str:
        """Text of the eos token; empty where there is none."""
        eos = self._vocabulary.eos
        return "" if eos is None else self.token_text(eos)

    def token_text(self, token: int) -> str:
        """The token's entry in the vocabulary, as the file has it."""
        self._check(token)
        return self._vocabulary.texts[token]

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of a token; a character may be cut. Control tokens give their names."""
        self._check(token)
        return self._encoder.bytes_of(token)

    def token_id(self, text: str) -> int | None:
        """Id of the token with this entry in the vocabulary, or None."""
        return self._vocabulary.ids.get(text)

    def encode(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """Return the ids of `text`.

        Texts of user-defined tokens always stand for them; those of control tokens only with
        `special`, otherwise they are text like any other. The longest match counts. `bos` says
        whether bos comes first; None leaves it to the file, without doubling one that the text
        spells out. Characters that are no Unicode (lone surrogates) become U+FFFD. Raises
        `TokenizerError` for a text that the vocabulary cannot express.
        """
        return self.encode_parts([(text, special)], bos=bos)

    def encode_parts(
        self, parts: Iterable[tuple[str, bool]], *, bos: bool | None = None
    ) -> list[int]:
        """Encode a text made of parts, each with its own `special`; see `encode`.

        The result is that of the whole text: a boundary that is no special token leaves no trace.
        """
        ids: list[int] = []
        plain = ""
        for text, special in parts:
            finder = self._all if special else self._always
            for piece in finder.split(_unicode(text)):
                if isinstance(piece, str):
                    plain += piece
                    continue
                ids += self._encode_plain(plain)
                ids.append(piece)
                plain = ""
        ids += self._encode_plain(plain)
        return self._with_bos(ids, bos)

    def decode(self, ids: Iterable[int], *, special: bool = False, start: bool = True) -> str:
        """Return the text of `ids`.

        Control tokens have no text, unless `special` asks for their names; think tags always show.
        Bytes that are not UTF-8 become U+FFFD. With `start` the ids begin a text: the space that
        SentencePiece puts before one is taken away.
        """
        stream = self.stream(special=special, start=start)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, special: bool = False, start: bool = False) -> TextStream:
        """Begin decoding token by token; see `decode`. By default the ids continue a text."""
        strips = start and self._encoder.starts_with_space

        def text_bytes(token: int) -> bytes:
            data = self.token_bytes(token)
            return b"" if not special and self._vocabulary.is_hidden(token) else data

        return TextStream(text_bytes, strips_space=strips)

    def _encode_plain(self, text: str) -> list[int]:
        return self._encoder.encode(text) if text else []

    def _with_bos(self, ids: list[int], bos: bool | None) -> list[int]:
        if bos is None:
            bos = self.add_bos and ids[:1] != [self.bos_id]
        if not bos:
            return ids
        if self.bos_id is None:
            raise TokenizerError("encode with bos: the file names no bos token")
        return [self.bos_id, *ids]

    def _match_texts(self, *types: TokenType) -> dict[str, int]:
        tokens = self._vocabulary.of_types(types).values()
        return {self._encoder.match_text(token): token for token in tokens}

    def _check(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise TokenizerError(
                f"token {token} is outside the vocabulary of {self.n_vocab} tokens"
            )


class TextStream:
    """Decodes ids one at a time; a character comes out whole, with the id that completes it."""

    def __init__(self, text_bytes: Callable[[int], bytes], *, strips_space: bool) -> None:
        self._text_bytes = text_bytes
        self._strips_space = strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take the next id; return the text that is complete now."""
        data = self._text_bytes(token)
        if self._strips_space and data:
            self._strips_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """End of text: a character that is still incomplete becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class _TokenFinder:
    """Finds tokens by their texts, the longest first."""

    def __init__(self, ids: dict[str, int]) -> None:
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for text in ids:
            lengths.setdefault(text[0], set()).add(len(text))
        # By first character and length, which takes no time to build for thousands of tokens, as
        # a pattern of all of them would.
        self._lengths = {first: sorted(of, reverse=True) for first, of in lengths.items()}
        self._first = re.compile("|".join(map(re.escape, lengths)) or r"(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the tokens' ids and the stretches of text between them, in order."""
        done = at = 0
        while match := self._first.search(text, at):
            at = match.start()
            found = self._longest(text, at)
            if found is None:
                at += 1
                continue
            if done < at:
                yield text[done:at]
            yield self._ids[found]
            done = at = at + len(found)
        if done < len(text):
            yield text[done:]

    def _longest(self, text: str, at: int) -> str | None:
        candidates = (text[at : at + length] for length in self._lengths[text[at]])
        return next((found for found in candidates if found in self._ids), None)


def _unicode(text: str) -> str:
    """`text` without lone surrogates, which no tokenizer takes; paired ones are joined."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

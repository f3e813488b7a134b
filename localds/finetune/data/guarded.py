"""Texts in which only the template may write special tokens, and how they are encoded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from localds.finetune.data.examples import Encoded
from localds.prompt import Guard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localds.finetune.data.chat import Part
    from localds.tokenizer import Tokenizer


class GuardedText:
    """Encodes with one tokenizer. Raises `ValueError` for one without an end token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._guard = Guard(tokenizer.special_texts)
        self.eos = tokenizer.eos_text
        eos = tokenizer.token_id(self.eos)
        if eos is None or not self.eos:
            raise ValueError("the model file names no end token, so no reply could end")
        self.eos_id = eos
        texts = sorted(map(tokenizer.token_text, tokenizer.eos_ids), key=len, reverse=True)
        self._ends = re.compile("|".join(map(re.escape, texts)))
        first = tokenizer.decode(tokenizer.encode("a", bos=False), start=False)
        self._starts_with_space = first.startswith(" ")

    def hide(self, value: Any) -> Any:
        """`value` with the texts of special tokens in it replaced by stand-ins."""
        return self._guard.hide(value)

    def end_of(self, text: str) -> int | None:
        """Where the first end token in `text` ends; None where there is none."""
        found = self._ends.search(text)
        return found.end() if found else None

    def end_at_start(self, text: str) -> str | None:
        """The end token that `text` begins with."""
        found = self._ends.match(text)
        return found[0] if found else None

    def encode_parts(self, parts: Sequence[Part]) -> Encoded:
        """Encode hidden texts one by one, the first with bos as the tokenizer's rule has it."""
        ids: list[int] = []
        trained: list[bool] = []
        for i, part in enumerate(parts):
            new = self._encode_part(part) if i else self._guard.encode(part.text, self._tokenizer)
            ids += new
            trained += [part.trained] * len(new)
        return _encoded(ids, trained)

    def encode_completion(self, prompt: str, completion: str) -> Encoded:
        """A plain text that is not learned, how it goes on, and eos."""
        before = self._tokenizer.encode(prompt)
        after = [*self.continuation(completion), self.eos_id]
        return _encoded(before + after, [False] * len(before) + [True] * len(after))

    def encode_text(self, text: str) -> Encoded:
        """A plain text, all of which is learned, and eos."""
        ids = [*self._tokenizer.encode(text), self.eos_id]
        return _encoded(ids, [True] * len(ids))

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on within another, without the space that begins one."""
        if not self._starts_with_space:
            return self._tokenizer.encode(text, bos=False)
        anchor = self._tokenizer.encode("\n", bos=False)
        ids = self._tokenizer.encode("\n" + text, bos=False)
        return ids[len(anchor) :]

    def _encode_part(self, part: Part) -> list[int]:
        """Ids of what follows another part."""
        text = part.text
        if part.reply and self._starts_with_space:
            # The encoder puts a space before it, and the template's own is that space.
            text = text.removeprefix(" ")
        return self._guard.encode(text, self._tokenizer, bos=False)


def _encoded(ids: list[int], trained: list[bool]) -> Encoded:
    counts = np.array(trained, np.bool_)
    counts[:1] = False
    return Encoded(np.array(ids, np.int32), counts)

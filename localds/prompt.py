"""From what a caller says to tokens: chat template, special tokens, and what may not be forged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from localds.template import ChatTemplate
    from localds.tokenizer import Tokenizer

    Message = Mapping[str, object]

# Stand-ins for special tokens that a message spells out, from a private plane of Unicode that no
# template looks at.
_FIRST_STAND_IN = 0xF0000
_THINK_OPENED = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids, and whether the reply begins inside a thinking part."""

    ids: list[int]
    opens_thinking: bool


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompt: str | Sequence[Message],
    template_options: Mapping[str, Any],
) -> EncodedPrompt:
    """Encode a plain text or a conversation.

    In a conversation only the template may write special tokens: where a message contains the
    text of one, it is encoded as plain text. Raises `TemplateError` and `ValueError`.
    """
    if isinstance(prompt, str):
        return EncodedPrompt(tokenizer.encode(prompt), opens_thinking=False)
    guard = Guard(tokenizer.special_texts)
    rendered = template.render(guard.hide(prompt), **template_options)
    return EncodedPrompt(
        guard.encode(rendered, tokenizer),
        opens_thinking=_THINK_OPENED.search(rendered) is not None,
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of equal leading elements."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


class Guard:
    """Hides special tokens spelled out in messages while the template runs."""

    def __init__(self, special_texts: Sequence[str]) -> None:
        self._texts = sorted(special_texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        self._numbers = {text: i for i, text in enumerate(self._texts)}
        last = chr(_FIRST_STAND_IN + max(len(self._texts) - 1, 0))
        self._stand_in = re.compile(f"([{chr(_FIRST_STAND_IN)}-{last}])")

    def hide(self, value: object) -> list[dict[str, object]]:
        """The messages with every special token's text replaced by a stand-in."""
        return self._hide(value)  # type: ignore[return-value]

    def encode(self, rendered: str, tokenizer: Tokenizer, *, bos: bool | None = None) -> list[int]:
        """Encode the template's output; stand-ins become the plain text that they stand for.

        `bos` as in `Tokenizer.encode`.
        """
        parts = (
            (self._texts[ord(part) - _FIRST_STAND_IN], False) if i % 2 else (part, True)
            for i, part in enumerate(self._stand_in.split(rendered))
        )
        return tokenizer.encode_parts(parts, bos=bos)

    def _hide(self, value: object) -> object:
        if isinstance(value, str):
            # A stand-in that the message itself contains would be taken for a hidden token.
            clean = self._stand_in.sub("\ufffd", value)
            return self._pattern.sub(
                lambda m: chr(_FIRST_STAND_IN + self._numbers[m.group()]), clean
            )
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value

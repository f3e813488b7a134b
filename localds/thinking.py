"""Telling the part between think tags from the answer, in text that arrives in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from localds.matching import partial_suffix

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["thinking", "answer"]

# DeepSeek, GLM and Kimi use the first pair, Mistral the second.
THINK_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply, or the beginning of one: what was thought, and the answer."""

    thinking: str = ""
    answer: str = ""

    def written(self, *, opened: bool) -> str:
        """The text as the model wrote it, tags (DeepSeek's) included.

        `opened` says that the prompt opened the thinking part, so that its tag is not in the
        reply. A thinking part without an answer is still open.
        """
        if not self.thinking and not opened:
            return self.answer
        opening, closing = THINK_TAGS[0]
        text = self.thinking if opened else f"{opening}{self.thinking}"
        return f"{text}{closing}\n\n{self.answer.lstrip()}" if self.answer else text


class ThinkingSplitter:
    """Splits a reply into pieces of kind "thinking" and "answer"; only the tags are lost.

    An opening tag counts where the answer has not begun: at the start or right after a thinking
    part, white space aside. Anywhere else it is text, for an answer may speak of think tags.
    With `starts_inside` the prompt has already opened the thinking part, so that the text starts
    within it.
    """

    def __init__(
        self, *, starts_inside: bool = False, tags: Sequence[tuple[str, str]] = THINK_TAGS
    ) -> None:
        if not all(opening and closing for opening, closing in tags):
            raise ValueError(f"think tags {tags!r}: a tag must not be empty")
        self._closing_of = dict(tags)
        # The closing tags that end the present part; none while outside.
        self._closings = tuple(self._closing_of.values()) if starts_inside else ()
        self._answering = False
        self._held = ""

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Take the next piece of text; return the parts that are certain now, none empty."""
        self._held += text
        parts: list[tuple[Kind, str]] = []
        while self._step(parts):
            pass
        return parts

    def flush(self) -> list[tuple[Kind, str]]:
        """End of text: return what was held back."""
        held, self._held = self._held, ""
        return [(self._kind, held)] if held else []

    @property
    def _kind(self) -> Kind:
        return "thinking" if self._closings else "answer"

    def _step(self, parts: list[tuple[Kind, str]]) -> bool:
        """Handle the held text up to the next tag; False when more text is needed."""
        if self._closings:
            return self._think(parts)
        if not self._answering and self._open():
            return True
        if self._answering:
            self._emit(parts, len(self._held))
        return False

    def _think(self, parts: list[tuple[Kind, str]]) -> bool:
        found = [(at, -len(tag)) for tag in self._closings if (at := self._held.find(tag)) >= 0]
        if not found:
            self._emit(parts, len(self._held) - partial_suffix(self._held, self._closings))
            return False
        at, negative_length = min(found)
        self._emit(parts, at)
        self._held = self._held[-negative_length:]
        self._closings = ()
        return True

    def _open(self) -> bool:
        """Before the answer: enter a thinking part, or begin the answer, or wait for more."""
        text = self._held.lstrip()
        for opening, closing in self._closing_of.items():
            if text.startswith(opening):
                # White space before the tag belongs to the thinking part.
                blank = len(self._held) - len(text)
                self._held = self._held[:blank] + text[len(opening) :]
                self._closings = (closing,)
                return True
        self._answering = not any(opening.startswith(text) for opening in self._closing_of)
        return False

    def _emit(self, parts: list[tuple[Kind, str]], length: int) -> None:
        if length:
            parts.append((self._kind, self._held[:length]))
            self._held = self._held[length:]

"""Markdown as it streams in: top-level blocks, of which only the last one can still change.

CommonMark is parsed line by line, and a later line can only change what is still open: the last
top-level block, or the last item where that is a list. Everything before it is settled and is
neither parsed nor drawn again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from markdown_it.token import Token

Kind = Literal["text", "item", "code"]

PIECE_LINES = 200
"""Code is cut into blocks of this many lines, so that a long one costs no more while it grows."""

_OPENING = re.compile(r"( {0,3})(`{3,}|~{3,})")
_CODE = ("fence", "code_block")


@dataclass(frozen=True, slots=True)
class Block:
    """One top-level block, an item of a top-level list, or up to `PIECE_LINES` lines of code.

    `source` is its Markdown; of code, the lines between the fences, without the last newline.
    `number` is that of the code block, or of the first one inside the block, counted from 1 in the
    whole text. Code that goes on from the block before has `continued`.
    """

    kind: Kind
    source: str
    language: str = ""
    number: int = 1
    continued: bool = False


def make_parser() -> MarkdownIt:
    """What models write: CommonMark, tables and strikethrough.

    HTML and link definitions are shown as they stand: nothing that was written is hidden.
    """
    parser = MarkdownIt("commonmark", {"html": False})
    return parser.enable(["table", "strikethrough"]).disable("reference")


_PARSER = make_parser()


def code_blocks(text: str) -> list[str]:
    """The contents of all code blocks of a text, those inside lists and quotes too."""
    return [
        token.content.removesuffix("\n") for token in _PARSER.parse(text) if token.type in _CODE
    ]


class GrowingMarkdown:
    """The blocks of a text that grows at its end. `blocks` are those of all that was appended."""

    def __init__(self, text: str = "") -> None:
        self.blocks: list[Block] = []
        self._settled = 0  # blocks that cannot change
        self._tail = ""  # the source of those that can
        self._codes = 0  # code blocks among the settled ones
        self._fence: _OpenFence | None = None
        if text:
            self.append(text)

    def append(self, text: str) -> int:
        """Take more text; returns the index of the first block that is new or has changed."""
        changed = self._settled
        text = text.replace("\r", "")
        while text:
            text = self._append_code(text) if self._fence else self._append_text(text)
        return changed

    def _append_text(self, text: str) -> str:
        """Parse the tail anew; returns what follows the opening of a code block without an end."""
        self._tail += text
        lines = _lines(self._tail)
        parts = list(_split(_PARSER.parse(self._tail), lines))
        del self.blocks[self._settled :]
        if parts and _is_open_fence(parts[-1], lines):
            *parts, last = parts
            self._settle(parts)
            opening = _OPENING.match(lines[last.start])
            assert opening is not None  # noqa: S101  or it would be no fence
            self._fence = _OpenFence(opening[2], len(opening[1]), last.language)
            self._show_code(self._fence)
            self._tail = ""
            return "".join(lines[last.start + 1 :])
        first_open = _first_open(parts, lines)
        if first_open:
            self._settle(parts[:first_open])
            self._tail = "".join(lines[parts[first_open - 1].end :])
        self._show(parts[first_open:])
        return ""

    def _append_code(self, text: str) -> str:
        """Take lines of an open code block; returns what comes after its end."""
        fence = self._fence
        assert fence is not None  # noqa: S101  the caller looked
        del self.blocks[self._settled :]
        rest = fence.append(text)
        while len(fence.lines) > PIECE_LINES:
            self.blocks.append(_code(fence.take_piece(), fence, self._codes + 1))
            fence.continued = True
            self._settled += 1
        self._show_code(fence)
        if fence.closed:
            self._settled = len(self.blocks)
            self._codes += 1
            self._fence = None
        return rest

    def _show_code(self, fence: _OpenFence) -> None:
        # A last line that looks like the end is one where nothing more comes.
        ends = bool(fence.last) and _closes(fence.last, fence.fence)
        self.blocks.append(_code(fence.lines[:-1] if ends else fence.lines, fence, self._codes + 1))

    def _settle(self, parts: Sequence[_Part]) -> None:
        self._show(parts)
        self._settled = len(self.blocks)
        self._codes += sum(part.codes for part in parts)

    def _show(self, parts: Sequence[_Part]) -> None:
        number = self._codes + 1
        for part in parts:
            self.blocks += _to_blocks(part, number)
            number += part.codes


@dataclass(slots=True)
class _Part:
    """A block of the tail: lines `start` to `end`, and the number of code blocks in it."""

    kind: Kind
    source: str
    start: int
    end: int
    codes: int = 0
    language: str = ""
    fence: str = ""


def _lines(text: str) -> list[str]:
    """Lines with their newlines; unlike `splitlines`, those that Markdown knows."""
    *whole, last = text.split("\n")
    return [line + "\n" for line in whole] + ([last] if last else [])


def _split(tokens: Sequence[Token], lines: Sequence[str]) -> Iterator[_Part]:
    """The top-level blocks of a parsed text, and the items of top-level lists."""
    part: _Part | None = None
    in_list = False
    for token in tokens:
        if token.level == 0 and token.type in ("bullet_list_open", "ordered_list_open"):
            in_list = True
        elif token.level == 0 and token.type in ("bullet_list_close", "ordered_list_close"):
            in_list = False
        elif token.map and token.nesting >= 0 and token.level == (1 if in_list else 0):
            if part:
                yield part
            part = _part(token, lines)
        elif part and token.type in _CODE:
            part.codes += 1
    if part:
        yield part


def _part(token: Token, lines: Sequence[str]) -> _Part:
    start, end = token.map or (0, 0)
    if token.type == "fence":
        language = token.info.strip().partition(" ")[0]
        return _Part("code", token.content, start, end, 1, language, token.markup)
    if token.type == "code_block":
        return _Part("code", token.content, start, end, 1)
    kind: Kind = "item" if token.type == "list_item_open" else "text"
    return _Part(kind, "".join(lines[start:end]), start, end)


def _is_open_fence(part: _Part, lines: Sequence[str]) -> bool:
    """Whether a block is code whose end has not come, and whose first line is complete."""
    if not part.fence or not lines[part.start].endswith("\n"):
        return False
    last = lines[part.end - 1]
    return part.end - part.start == 1 or not (last.endswith("\n") and _closes(last, part.fence))


def _closes(line: str, fence: str) -> bool:
    opening = _OPENING.match(line)
    return (
        opening is not None and opening[2].startswith(fence) and not line[opening.end() :].strip()
    )


def _first_open(parts: Sequence[_Part], lines: Sequence[str]) -> int:
    """Index of the first block that more text may change.

    That is the last one; or the one before too, where the last begins in a line that is not yet
    complete, and may turn out to belong to it.
    """
    incomplete = bool(lines) and not lines[-1].endswith("\n")
    begins_there = bool(parts) and parts[-1].start == len(lines) - 1
    return max(len(parts) - (2 if incomplete and begins_there else 1), 0)


def _to_blocks(part: _Part, number: int) -> Iterator[Block]:
    if part.kind != "code":
        yield Block(part.kind, part.source, number=number)
        return
    lines = _lines(part.source)
    for start in range(0, max(len(lines), 1), PIECE_LINES):
        source = "".join(lines[start : start + PIECE_LINES]).removesuffix("\n")
        yield Block("code", source, part.language, number, continued=start > 0)


def _code(lines: Sequence[str], fence: _OpenFence, number: int) -> Block:
    source = "".join(lines).removesuffix("\n")
    return Block("code", source, fence.language, number, continued=fence.continued)


class _OpenFence:
    """A fenced code block whose end has not come. `lines` are those not yet in a settled block."""

    def __init__(self, fence: str, indent: int, language: str) -> None:
        self.language = language
        self.lines: list[str] = []
        self.continued = False
        self.closed = False
        self.fence = fence
        self._indent = re.compile(f" {{0,{indent}}}")
        self.last = ""  # the line whose end has not come, as it was written

    def append(self, text: str) -> str:
        """Take text up to the closing fence, as far as lines are complete; returns the rest."""
        if self.last:
            text = self.last + text
            self.lines.pop()
        lines = _lines(text)
        for i, line in enumerate(lines):
            if line.endswith("\n") and _closes(line, self.fence):
                self.closed = True
                self.last = ""
                return "".join(lines[i + 1 :])
            self.lines.append(self._indent.sub("", line, count=1))
        self.last = "" if lines[-1].endswith("\n") else lines[-1]
        return ""

    def take_piece(self) -> list[str]:
        """Give out the first lines, which cannot change; what follows continues them."""
        piece, self.lines = self.lines[:PIECE_LINES], self.lines[PIECE_LINES:]
        return piece

"""One message of a conversation as lines: its head, what the model thought, the text, its end.

Lines are drawn when they are first needed, and of a text that grows only the block that changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text
from textual.strip import Strip

from tui.literal import literal
from tui.markdown.blocks import Block, GrowingMarkdown, code_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.markdown.paint import Painter
    from tui.store.records import Role

BLANK = Strip.blank(0)


class _Lines:
    """The lines of blocks, with an empty one between two, but for the items of a list."""

    def __init__(self) -> None:
        self.lines: list[Strip] = []
        self._ends: list[int] = []  # of each block

    def paint(self, blocks: Sequence[Block], changed: int, painter: Painter) -> None:
        """Draw the blocks from index `changed` on."""
        changed = min(changed, len(self._ends))
        del self._ends[changed:]
        del self.lines[self._ends[-1] if self._ends else 0 :]
        for i in range(changed, len(blocks)):
            if i and not _joined(blocks[i - 1], blocks[i]):
                self.lines.append(BLANK)
            self.lines += painter.block(blocks[i])
            self._ends.append(len(self.lines))


def _joined(before: Block, block: Block) -> bool:
    return block.continued or before.kind == block.kind == "item"


class _Grown:
    """A Markdown text and its lines."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._markdown: GrowingMarkdown | None = None
        self._lines = _Lines()
        self._changed = 0

    def append(self, text: str) -> None:
        self.text += text
        if self._markdown is not None:
            self._changed = min(self._changed, self._markdown.append(literal(text)))

    def lines(self, painter: Painter) -> list[Strip]:
        if self._markdown is None:
            self._markdown = GrowingMarkdown(literal(self.text))
        blocks = self._markdown.blocks
        if self._changed < len(blocks):
            self._lines.paint(blocks, self._changed, painter)
            self._changed = len(blocks)
        return self._lines.lines

    def forget_lines(self) -> None:
        self._lines = _Lines()
        self._changed = 0


class Entry:
    """A message on the screen. `key` is its number in the store.

    `title` is who speaks, `detail` what stands beside it; `branch` (place, number of branches),
    counted from 1, where there are several. `note` stands below the text.
    """

    def __init__(
        self,
        key: int,
        role: Role,
        title: str,
        content: str = "",
        *,
        thinking: str = "",
        thinking_seconds: float = 0.0,
        detail: str = "",
        branch: tuple[int, int] = (1, 1),
        attachments: Sequence[str] = (),
        note: str = "",
    ) -> None:
        self.key = key
        self.role = role
        self.title = title
        self.detail = detail
        self.branch = branch
        self.attachments = tuple(attachments)
        self.thinking_seconds = thinking_seconds
        self.note = note
        self.streaming = False
        self._unfolded = False
        self._thinking = _Grown(thinking)
        self._content = _Grown(content)
        self._lines: list[Strip] | None = None
        self._drawn: list[Strip] = []  # the lines before the last change
        self.changed_from = 0
        self._height: int | None = None
        self.thinking_line: int | None = None

    @property
    def content(self) -> str:
        """The text that was said."""
        return self._content.text

    @property
    def thinking(self) -> str:
        """What was thought before."""
        return self._thinking.text

    @property
    def codes(self) -> list[str]:
        """The blocks of code in the text, by their numbers."""
        return code_blocks(self.content) if self.role == "assistant" else []

    def append(self, content: str = "", thinking: str = "") -> None:
        """Take more of a reply that streams."""
        if content:
            self._content.append(content)
        if thinking:
            self._thinking.append(thinking)
        self.touch()

    def touch(self) -> None:
        """Something beside the texts has changed."""
        if self._lines is not None:
            self._drawn = self._lines
        self._lines = None
        self._height = None

    @property
    def unfolded(self) -> bool:
        """Whether the thinking part is shown whole."""
        return self._unfolded

    @unfolded.setter
    def unfolded(self, value: bool) -> None:
        self._unfolded = value
        self.touch()

    def restyle(self) -> None:
        """The width or the colours have changed."""
        self.release()
        self._height = None

    def release(self) -> None:
        """Forget the lines, but not how many they are: the entry is far from what is seen."""
        self._thinking.forget_lines()
        self._content.forget_lines()
        self._lines = None
        self._drawn = []

    def is_measured(self) -> bool:
        """Whether `height` is exact."""
        return self._height is not None

    def height(self, width: int) -> int:
        """Lines: exact once they were drawn, a guess before."""
        if self._height is not None:
            return self._height
        text = self.content
        return 3 + text.count("\n") + len(text) // max(width, 1)

    def lines(self, painter: Painter) -> list[Strip]:
        """All lines, the last one empty; those before `changed_from` are as they were."""
        if self._lines is None:
            lines = painter.text(self._head(painter))
            for name in self.attachments:
                lines += painter.text(f"@ {literal(name)}", painter.colours.muted)
            lines += self._thinking_lines(painter, len(lines))
            lines += self._text_lines(painter)
            if self.note:
                lines += painter.text(literal(self.note), painter.colours.muted)
            self._lines = [*lines, BLANK]
            self._height = len(self._lines)
            self.changed_from = _first_difference(self._drawn, self._lines)
            self._drawn = []
        return self._lines

    def _head(self, painter: Painter) -> Text:
        colours = painter.colours
        head = Text(overflow="ellipsis", no_wrap=True)
        head.append(literal(self.title), colours.heading if self.role == "user" else colours.title)
        if self.branch[1] > 1:
            head.append(f"  < {self.branch[0]} of {self.branch[1]} >", colours.accent)
        if self.detail:
            head.append(f"  {self.detail}", colours.muted)
        return head

    def _thinking_lines(self, painter: Painter, above: int) -> list[Strip]:
        self.thinking_line = above if self.thinking else None
        if not self.thinking:
            return []
        running = self.streaming and not self.content
        sign = "▾" if self.unfolded else "▸"
        title = f"{sign} {'thinking' if running else 'thought'}{self._thinking_size()}"
        lines = painter.text(title, painter.colours.muted)
        if self.unfolded:
            bar = Strip([painter.bar])
            lines += [Strip.join([bar, line]) for line in self._thinking.lines(painter.dim)]
        return [*lines, BLANK]

    def _thinking_size(self) -> str:
        words = len(self.thinking.split())
        seconds = f" for {self.thinking_seconds:.0f} s" if self.thinking_seconds >= 1 else ""
        return f"{seconds} · {words} {'word' if words == 1 else 'words'}"

    def _text_lines(self, painter: Painter) -> list[Strip]:
        if self.role == "user":
            return painter.text(literal(self.content)) if self.content else []
        return self._content.lines(painter)


def _first_difference(before: Sequence[Strip], now: Sequence[Strip]) -> int:
    pairs = enumerate(zip(before, now, strict=False))
    equal = min(len(before), len(now))
    return next((i for i, (old, new) in pairs if old is not new and old != new), equal)

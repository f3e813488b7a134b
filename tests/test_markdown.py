"""Markdown that streams in: its blocks, and how they are drawn."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it.tree import SyntaxTreeNode
from rich.style import Style

from tui.markdown.blocks import PIECE_LINES, Block, GrowingMarkdown, code_blocks, make_parser
from tui.markdown.paint import Colours, Painter

if TYPE_CHECKING:
    from collections.abc import Iterator

COLOURS = Colours(
    text=Style(),
    muted=Style(dim=True),
    accent=Style(italic=True),
    heading=Style(bold=True),
    title=Style(bold=True),
    code=Style(bgcolor="#202020"),
    syntax="ansi_dark",
)
# Whatever begins, ends or continues a block, and words.
BITS = st.sampled_from([
    "para", "word two", "\n", "\n\n", "- ", "1. ", "2) ", "```", "```py", "~~~", "# ", "## h",
    "---", "=", "-", "> ", "    ", "  ", "   ", "`", "`x`", "**b**", "<div>", "[a]: b", "\t", "*",
    "+ ", "1", "#", "\\", "a|b", "&amp;", " ", "- - ", "\n1. ", "|", "|a|b|\n|-|-|\n|1|2|",
])  # fmt: skip


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Kind and source of the blocks that markdown-it finds when it is given the whole text."""
    lines = [line + "\n" for line in text.split("\n")]
    found = []
    for node in _top_level(SyntaxTreeNode(make_parser().parse(text))):
        start, end = node.map or (0, 0)
        if node.type in ("fence", "code_block"):
            found.append(("code", node.content.rstrip()))
        else:
            kind = "item" if node.type == "list_item" else "text"
            found.append((kind, "".join(lines[start:end]).rstrip()))
    return found


def _top_level(root: SyntaxTreeNode) -> Iterator[SyntaxTreeNode]:
    for node in root.children:
        if node.type in ("bullet_list", "ordered_list"):
            yield from node.children
        else:
            yield node


@settings(max_examples=300, deadline=None)
@given(st.lists(BITS, max_size=25), st.lists(st.integers(1, 6), min_size=1))
def test_however_a_text_is_cut_its_blocks_are_those_of_the_whole(
    bits: list[str], cuts: list[int]
) -> None:
    text = "".join(bits)
    # A table whose header looks like an item or a fence: what that is depends on what was before.
    assume(not re.search(r"(?m)^[ >\t]*([-*+]|\d+[.)]|```|~~~)[^\n]*\|", text))
    growing = GrowingMarkdown()
    at = 0
    for number in range(len(text)):
        before = list(growing.blocks)
        piece = text[at : at + cuts[number % len(cuts)]]
        changed = growing.append(piece)
        at += len(piece)
        assert growing.blocks[:changed] == before[:changed]
        found = [(block.kind, block.source.rstrip()) for block in growing.blocks]
        assert found == blocks_of(text[:at])
        if at >= len(text):
            break


def test_settled_blocks_stay() -> None:
    growing = GrowingMarkdown("one\n\ntwo\n\n- a\n- b\n")
    assert growing.append("- c\n") == 3
    assert growing.append("and more") == 4


@pytest.mark.parametrize("step", [1, 7, 5000])
def test_long_code_is_cut_into_pieces_that_do_not_change(step: int) -> None:
    lines = [f"line {i}\n" for i in range(3 * PIECE_LINES + 5)]
    text = "```py\n" + "".join(lines) + "```\nafter"
    growing = GrowingMarkdown()
    for start in range(0, len(text), step):
        changed = growing.append(text[start : start + step])
        assert changed >= len(growing.blocks) - 2 - step // (8 * PIECE_LINES)
    *code, after = growing.blocks
    assert "\n".join(block.source for block in code) + "\n" == "".join(lines)
    assert [block.continued for block in code] == [False, True, True, True]
    assert {(block.language, block.number) for block in code} == {("py", 1)}
    assert after == Block("text", "after", number=2)


def test_blocks_of_code_are_numbered_through_lists_and_quotes() -> None:
    text = "```\none\n```\n- item\n  ```sh\n  two\n  ```\n\n> ```\n> three\n> ```\n\n    four\n"
    assert code_blocks(text) == ["one", "two", "three", "four"]
    assert [block.number for block in GrowingMarkdown(text).blocks] == [1, 2, 3, 4]


def test_an_indented_fence_loses_its_indent_as_it_streams() -> None:
    growing = GrowingMarkdown()
    for character in "  ```\n  a\n    b\n  ```\n":
        growing.append(character)
    assert growing.blocks == [Block("code", "a\n  b")]


def painted(text: str, width: int = 40) -> list[str]:
    painter = Painter(COLOURS, width)
    strips = [strip for block in GrowingMarkdown(text).blocks for strip in painter.block(block)]
    assert all(strip.cell_length <= width for strip in strips)
    return [strip.text.rstrip() for strip in strips]


def test_nothing_that_was_written_is_hidden() -> None:
    lines = painted("<b>bold</b> ![pic](a.png) [link](http://b.c)\n\n[ref]: http://d.e\n")
    text = " ".join(lines)
    assert text == "<b>bold</b> [image: pic] (a.png) link (http://b.c) [ref]: http://d.e"


def test_code_keeps_every_character() -> None:
    code = "if  x:\n    y = [1,\t2]  # [bold]\n"
    _, *lines = painted(f"```python\n{code}```")
    assert [line.removeprefix(" ") for line in lines] == code.expandtabs(4).splitlines()


def test_a_code_block_says_its_language_and_number() -> None:
    lines = painted("```\nx\n```\n\n```made-up-language\ny\n```")
    assert lines == [" code" + " " * 31 + "[1]", " x", " made-up-language" + " " * 19 + "[2]", " y"]


def test_lists_tables_and_quotes_are_drawn() -> None:
    lines = painted("3. three\n4. four\n\n- dot\n\n> said\n\n|a|b|\n|-|-|\n|1|2|\n")
    assert lines == [
        " 3 three", " 4 four", " • dot", "▌ said", " a  b", " ────", " 1  2",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [8, 20, 79, 200])
def test_lines_fit_whatever_the_width(width: int) -> None:
    painted("# " + "heading " * 20 + "\n\n" + "x" * 500 + "\n\n|" + "cell|" * 9 + "\n", width)
    painted("```\n" + "wide 漢字 " * 40 + "\n```\n- " + "漢字" * 90, width)

"""Blocks of Markdown as lines of the terminal, drawn by Rich in the colours of the theme."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from markdown_it.token import Token
from rich.console import Console
from rich.markdown import CodeBlock, Heading, HorizontalRule, Markdown
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme
from textual.strip import Strip

from tui.markdown.blocks import make_parser

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderResult

    from tui.markdown.blocks import Block

_PARSER = make_parser()
_MOST_HIGHLIGHTED = 20_000
"""Characters of a piece of code beyond which it is drawn plain: a line of a megabyte, say."""


@dataclass(frozen=True, slots=True)
class Colours:
    """Styles of a theme.

    `title` is that of a model's name; `code` has the background of code blocks; `syntax` names a
    style of Pygments.
    """

    text: Style
    muted: Style
    accent: Style
    heading: Style
    title: Style
    code: Style
    syntax: str


class Painter:
    """Draws blocks, `width` columns wide at most. `drawn` counts them."""

    def __init__(self, colours: Colours, width: int) -> None:
        self.drawn = 0
        self.colours = colours
        self.width = max(width, 8)
        self._console = Console(
            file=io.StringIO(),
            width=self.width,
            color_system="truecolor",
            force_terminal=True,
            legacy_windows=False,
            theme=_rich_theme(colours),
            highlight=False,
            emoji=False,
        )

    def block(self, block: Block) -> list[Strip]:
        """The lines of one block."""
        self.drawn += 1
        if block.kind == "code":
            number = None if block.continued else block.number
            return self._lines(_Code(block.source, block.language, number, self.colours))
        return _trimmed(self._lines(_Markdown(block.source, block.number, self.colours)))

    @cached_property
    def dim(self) -> Painter:
        """Draws what stands back, such as what a model thinks, to the right of a `bar`."""
        colours = self.colours
        bold = colours.muted + Style(bold=True)
        muted = replace(colours, text=colours.muted, heading=bold)
        return Painter(muted, self.width - self.bar.cell_length)

    @property
    def bar(self) -> Segment:
        """What stands to the left of text that is set apart."""
        return Segment("▏ ", self.colours.muted)

    def text(self, text: str | Text, style: Style | None = None) -> list[Strip]:
        """Plain text, wrapped."""
        if isinstance(text, str):
            text = Text(text, style or "")
        return self._lines(text)

    def _lines(self, renderable: object) -> list[Strip]:
        options = self._console.options.update(width=self.width, height=None)
        lines = self._console.render_lines(
            renderable,  # type: ignore[arg-type]
            options,
            style=self.colours.text,
            pad=False,
        )
        return [Strip(line).simplify() for line in lines]


def _trimmed(strips: list[Strip]) -> list[Strip]:
    """Without the empty lines that Rich puts around what it draws."""
    filled = [i for i, strip in enumerate(strips) if strip.text.strip()]
    return strips[filled[0] : filled[-1] + 1] if filled else []


def _rich_theme(colours: Colours) -> Theme:
    accent, muted = colours.accent, colours.muted
    return Theme(
        {
            **{f"markdown.h{level}": colours.heading for level in range(1, 7)},
            "markdown.h1": colours.heading + Style(underline=True),
            "markdown.code": accent,
            "markdown.code_block": colours.code,
            "markdown.block_quote": muted,
            "markdown.hr": muted,
            "markdown.item.bullet": muted,
            "markdown.item.number": muted,
            "markdown.link": colours.text + Style(underline=True),
            "markdown.link_url": muted,
            "markdown.table.border": muted,
            "markdown.table.header": colours.heading,
            "markdown.strong": Style(bold=True),
            "markdown.em": Style(italic=True),
            "markdown.s": Style(strike=True),
        }
    )


class _Code:
    """A block of code on a background of its own, with its language and number above."""

    def __init__(self, source: str, language: str, number: int | None, colours: Colours) -> None:
        self.source = source
        self.language = language
        self.number = number
        self.colours = colours

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        code = self.colours.code
        if self.number is not None:
            yield from self._label(width, code + self.colours.muted)
        inner = options.update(width=max(width - 2, 1), height=None)
        for line in console.render_lines(self._body(), inner, style=code, pad=True):
            yield Segment(" ", code)
            yield from line
            yield Segment(" ", code)
            yield Segment.line()

    def _label(self, width: int, style: Style) -> Iterable[Segment]:
        number = f"[{self.number}] "
        language = Text(f" {self.language or 'code'}")
        language.truncate(max(width - len(number) - 1, 0), pad=False)
        gap = max(width - language.cell_len - len(number), 0)
        yield Segment(language.plain + " " * gap + number, style)
        yield Segment.line()

    def _body(self) -> Text | Syntax:
        if not self.source or len(self.source) > _MOST_HIGHLIGHTED or not self.language:
            return Text(self.source, overflow="fold", tab_size=4)
        return Syntax(
            self.source,
            self.language,
            theme=self.colours.syntax,
            word_wrap=True,
            tab_size=4,
        )


class _LeftHeading(Heading):
    LEVEL_ALIGN: ClassVar = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Rule(HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style="markdown.hr")


class _NestedCode(CodeBlock):
    """Code inside of a list or a quote."""

    colours: Colours
    number: int

    @classmethod
    def create(cls, markdown: Markdown, token: object) -> _NestedCode:
        assert isinstance(markdown, _Markdown)  # noqa: S101  which has these elements
        language = str(getattr(token, "info", "")).strip().partition(" ")[0]
        block = cls(language, markdown.code_theme)
        block.colours = markdown.colours
        block.number = markdown.number
        markdown.number += 1
        return block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        source = str(self.text).removesuffix("\n")
        yield _Code(source, self.lexer_name, self.number, self.colours)


class _Markdown(Markdown):
    """Rich's Markdown without what a terminal chat does not want: HTML, links that hide a place."""

    elements: ClassVar = Markdown.elements | {
        "heading_open": _LeftHeading,
        "hr": _Rule,
        "fence": _NestedCode,
        "code_block": _NestedCode,
    }

    def __init__(self, source: str, number: int, colours: Colours) -> None:
        # Rich's own __init__ makes a parser each time, which costs more than all the rest.
        self.markup = source
        self.code_theme = colours.syntax
        self.justify = None
        self.style = "none"
        self.hyperlinks = False
        self.inline_code_lexer = None
        self.inline_code_theme = colours.syntax
        self.parsed = [_without_images(token) for token in _PARSER.parse(source)]
        self.number = number
        self.colours = colours


def _without_images(token: Token) -> Token:
    """A terminal shows no images: their text and address stand for them."""
    for i, child in enumerate(token.children or ()):
        if child.type == "image":
            text = f"[image: {child.content}] ({child.attrs.get('src', '')})"
            token.children[i] = Token("text", "", 0, content=text)  # type: ignore[index]
    return token

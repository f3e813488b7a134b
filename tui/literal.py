"""Text of strangers, made safe to draw.

Textual passes escape characters on to the terminal, also where markup is off, and lone surrogates
(file names that are not UTF-8) break its output. What is drawn must go through here.
"""

from __future__ import annotations

import unicodedata

# Marks that reorder the text around them, and separators that terminals draw in different ways.
_REORDERING = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_CELL = "░"


def literal(text: str) -> str:
    r"""The text with control characters, reordering marks and surrogates written out, as in `\x1b`.

    Line ends stay; a tab becomes four spaces.
    """
    if text.isascii() and text.isprintable():
        return text
    lines = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(_written_out(c) if _is_unsafe(c) and c != "\n" else c for c in lines)


def one_cell_each(text: str) -> str:
    """The text with each unsafe character, line ends included, replaced by one block: for editors.

    As long as the original, so that positions of cursor and selection stay right.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_CELL if _is_unsafe(c) and c != "\t" else c for c in text)


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _REORDERING


def _written_out(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

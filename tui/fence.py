"""Text in a fence of Markdown, which nothing inside it can end."""

from __future__ import annotations

import re

_BACKTICKS = re.compile("`+")


def fenced(text: str) -> str:
    """The text between fences that are longer than any run of backticks in it."""
    longest = max(map(len, _BACKTICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    ending = "" if text.endswith("\n") else "\n"
    return f"{fence}\n{text}{ending}{fence}"

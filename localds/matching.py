"""Finding strings in text that arrives in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def partial_suffix(text: str, wanted: Iterable[str]) -> int:
    """Length of the longest end of `text` that could still grow into one of `wanted`.

    Only proper prefixes count: a string that `text` already holds whole is for the caller to find.
    """
    longest = 0
    for string in wanted:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest

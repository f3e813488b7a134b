"""The one error that a bad file leads to, and safe quoting of what the file says."""

from __future__ import annotations

from pathlib import Path

QUOTED_CHARACTERS = 80
"""Longest piece of a file's own text that a message repeats."""


class GGUFError(ValueError):
    """A GGUF file cannot be read, or says something that cannot be right.

    `field` names the part of the file (a key, a tensor, a header field) and `offset` is its
    position in bytes; both are None where the file as a whole is meant.
    """

    def __init__(
        self, message: str, *, field: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message)
        self.field = field
        self.offset = offset

    @classmethod
    def at(cls, path: Path, field: str, offset: int, problem: str) -> GGUFError:
        """An error at one place: `model.gguf: tensor 'x' (offset 96): problem`."""
        return cls(f"{path}: {field} (offset {offset}): {problem}", field=field, offset=offset)


def quote(text: str) -> str:
    """`text` from a file for a message: in quotes, on one line, escaped, cut where it is long."""
    return repr(text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + "…")

"""Pasted text is text: what it holds of escape characters must not become keys.

Textual's parser looks for escape sequences also inside of a bracketed paste, and hands what it does
not know to the app as keys: a paste could send a message, or leave the app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual._xterm_parser import XTermParser
from textual.drivers import linux_driver

if TYPE_CHECKING:
    from collections.abc import Iterable

    from textual.message import Message

_START, _END = "\x1b[200~", "\x1b[201~"


class PasteFilter:
    """Drops escape characters from pastes, in input that comes in pieces."""

    def __init__(self) -> None:
        self._inside = False
        self._passed = ""  # the last of what was passed on, where the start of a paste may begin
        self._held = ""  # of a paste, what may be the beginning of its end

    def clean(self, data: str) -> str:
        """The same input without escape characters inside of pastes."""
        out = []
        while data:
            part, data = self._paste(data) if self._inside else self._keys(data)
            out.append(part)
        return "".join(out)

    def _keys(self, data: str) -> tuple[str, str]:
        """Pass on what comes before the text of a paste; returns it and the rest."""
        seen = self._passed + data
        at = seen.find(_START)
        if at < 0:
            self._passed = seen[1 - len(_START) :]
            return data, ""
        self._inside = True
        self._passed = ""
        end = at + len(_START) - (len(seen) - len(data))
        return data[:end], data[end:]

    def _paste(self, data: str) -> tuple[str, str]:
        """Pass on a paste up to its end; returns it and the rest."""
        data = self._held + data
        self._held = ""
        at = data.find(_END)
        if at >= 0:
            self._inside = False
            return data[:at].replace("\x1b", "") + _END, data[at + len(_END) :]
        for length in range(min(len(_END) - 1, len(data)), 0, -1):
            if _END.startswith(data[-length:]):
                self._held = data[-length:]
                data = data[:-length]
                break
        return data.replace("\x1b", ""), ""


class _Parser(XTermParser):
    def __init__(self, debug: bool = False) -> None:
        super().__init__(debug)
        self._filter = PasteFilter()

    def feed(self, data: str) -> Iterable[Message]:
        # No data means the end of all input, so a piece that is held back whole is not passed on.
        cleaned = self._filter.clean(data) if data else data
        return super().feed(cleaned) if cleaned or not data else ()


def install() -> None:
    """Have the app's driver read its input through the filter."""
    linux_driver.XTermParser = _Parser  # type: ignore[attr-defined]

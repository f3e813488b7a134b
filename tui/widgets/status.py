"""The line above the prompt: the model, how full the context is, what goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.widgets import Static

from tui.literal import literal
from tui.progress import one_line, progress_of, status_line

if TYPE_CHECKING:
    from tui.chat import Chat
    from tui.engine import Engine, Loaded

_EDITING = "editing: Enter asks this instead, Esc leaves it"


class StatusLine(Static):
    """Drawn only when it says something else."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  Textual's name
        super().__init__(id=id, markup=False)
        self._line = ""

    def show(self, engine: Engine, loaded: Loaded | None, chat: Chat) -> None:
        """Say how things are."""
        title = literal(loaded.title) if loaded else "no model"
        progress = progress_of(engine, chat.last_run)
        rest = [
            _fullness(engine, empty=not chat.conversation.messages),
            _EDITING if chat.editing is not None else "",
            status_line(progress, engine.loading),
        ]
        line = one_line(title, rest, self.content_size.width)
        if line != self._line:
            self._line = line
            self.update(line, layout=False)


def _fullness(engine: Engine, *, empty: bool) -> str:
    if not engine.context_size:
        return ""
    return f"{0 if empty else engine.context_used} of {engine.context_size} tokens"

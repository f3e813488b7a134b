"""What the guide may say about commands, options and models: read from localds itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import typer

from localds.cli import app

if TYPE_CHECKING:
    from typer.core import TyperGroup


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a command: its names as typed, its help text, and its default ("" for none)."""

    command: str
    names: tuple[str, ...]
    help: str
    default: str

    @property
    def name(self) -> str:
        """The long name."""
        return max(self.names, key=len)


@dataclass(frozen=True, slots=True)
class Command:
    """One command and the first paragraph of its help."""

    name: str
    help: str
    options: tuple[Option, ...]


NOT_YET_LEARNED = {"finetune"}
"""Commands that are newer than the guide's training: what is said of them would be no text of its
kind. Empty this before it is trained again."""


def commands() -> list[Command]:
    """All commands that the guide knows, as the program's help shows them."""
    group = cast("TyperGroup", typer.main.get_command(app))
    found = []
    for name, command in group.commands.items():
        if name in NOT_YET_LEARNED:
            continue
        text = " ".join((command.help or "").split("\n\n")[0].split())
        options = [
            Option(name, tuple(p.opts), p.help or "", _default(p.default))
            for p in command.params
            if p.param_type_name == "option" and p.opts[0] != "--help"
        ]
        found.append(Command(name, text, tuple(options)))
    return found


def _default(value: object) -> str:
    """How a default is told; switches and options that may be absent have none."""
    return "" if value is None or isinstance(value, bool) or value == "" else str(value)

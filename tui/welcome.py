"""What an empty chat says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localds.catalog.resolve import How

if TYPE_CHECKING:
    from tui.engine import Loaded

WELCOME = """\
localds runs language models on this machine; nothing leaves it.

  Enter     send              Ctrl+J   new line
  @file     attach a text     /        commands
  Ctrl+O    choose a model    F2       settings
  Ctrl+B    chats             Ctrl+G   what the machine does
  F1        all keys          Ctrl+Q   leave"""

_ABOUT_DEMO = """

No model is installed, so this is the one in the box, a guide to localds.
Ask it how to get a real one, or choose one with Ctrl+O."""
_ABOUT_DEMO_AMONG_OTHERS = """

This is the model in the box, a tiny guide to localds. Ctrl+O chooses another."""


def about(loaded: Loaded) -> str:
    """What to say of a model that nobody named."""
    match loaded.found.how:
        case How.DEMO:
            return _ABOUT_DEMO
        case How.DEMO_AMONG_OTHERS:
            return _ABOUT_DEMO_AMONG_OTHERS
        case _:
            return ""

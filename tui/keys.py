"""All keys of the app, read off the classes that bind them."""

from __future__ import annotations

from textual.widgets import TextArea

from tui.screens.chat import ChatScreen
from tui.screens.help import KeyGroup, collect_bindings
from tui.screens.models import ModelsScreen
from tui.screens.settings import SettingsScreen
from tui.widgets.heat_map import HeatMap
from tui.widgets.prompt import Prompt
from tui.widgets.sidebar import Sidebar
from tui.widgets.transcript import Transcript


def key_groups() -> list[KeyGroup]:
    """The keys by the part of the app where they work."""
    return [
        KeyGroup(
            "Everywhere",
            [*collect_bindings(ChatScreen), ("Ctrl+P", "All commands"), ("Ctrl+Q", "Leave")],
        ),
        KeyGroup("Prompt", collect_bindings(Prompt)),
        KeyGroup("Messages", collect_bindings(Transcript)),
        KeyGroup("Chats", collect_bindings(Sidebar)),
        KeyGroup("Models", collect_bindings(ModelsScreen)),
        KeyGroup("Settings", collect_bindings(SettingsScreen)),
        KeyGroup("Expert map", collect_bindings(HeatMap)),
        KeyGroup("Editing", collect_bindings(TextArea)),
    ]

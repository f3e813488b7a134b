"""The chat app: what lives longer than a screen, and who talks to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textual.app import App, SystemCommand
from textual.message import Message

from tui.engine import Engine, Event, Loaded, LoadFailed, LoadOptions
from tui.keys import key_groups
from tui.paste_filter import install
from tui.screens.chat import ChatScreen
from tui.screens.help import HelpScreen
from tui.screens.models import Choice, ModelsScreen
from tui.screens.settings import SettingsResult, SettingsScreen
from tui.settings import SETTINGS, Layers
from tui.store.conversations import ConversationStore
from tui.store.error import StoreError
from tui.themes import THEMES, theme_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from textual.screen import Screen

    from tui.chat import Chat
    from tui.launch import Launch

_RELOADED = tuple(setting.key for setting in SETTINGS if setting.needs_reload)


class ChatApp(App[None]):
    """Owns the engine and the store. `loaded` is the model in use, None before there is one."""

    TITLE = "localds"
    CSS = """
    ToastRack { dock: top; align: right top; }
    CommandPalette SearchIcon { display: none; }
    """
    ENABLE_COMMAND_PALETTE = True

    @dataclass
    class Told(Message):
        """The engine has done something."""

        event: Event

    def __init__(self, launch: Launch, store: ConversationStore) -> None:
        super().__init__()
        self.animation_level = "none"
        self.launch = launch
        self.store = store
        self.loaded: Loaded | None = None
        self.engine = Engine(lambda event: self.post_message(self.Told(event)))
        self._options = LoadOptions()
        self._wanted = launch.model
        self._of_model: dict[str, Any] = {}
        self._of_all = store.settings("")
        self.chat_screen = ChatScreen(store)
        for theme in THEMES:
            self.register_theme(theme)
        self._apply_theme()

    def on_mount(self) -> None:
        """Show the chat, and load the model meanwhile."""
        self.theme_changed_signal.subscribe(self, lambda theme: self._keep_theme(theme.name))
        self.push_screen(self.chat_screen)
        self.load_model(self.launch.model)

    def on_unmount(self) -> None:
        """End the engine."""
        self.engine.close()

    # Settings

    def layers(self) -> Layers:
        """The settings that count in the chat on the screen."""
        return Layers(
            [
                ("this chat", self._of_chat()),
                *self._command_line(),
                ("this model", self._of_model),
                ("all models", self._of_all),
                *self._below_all(),
            ]
        )

    def _of_chat(self) -> Mapping[str, Any]:
        # Before its screen is shown there is no chat.
        chat: Chat | None = getattr(self.chat_screen, "chat", None)
        return chat.conversation.settings if chat else {}

    def _command_line(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("the command line", self.launch.given)]

    def _below_all(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("the model's file", self.loaded.recommended)] if self.loaded else []

    def settings_changed(self) -> None:
        """Follow settings that are other than before."""
        self._apply_theme()
        self.chat_screen.show_parts()
        if self._load_options() != self._options:
            self.chat_screen.when_free(self._reload)

    def _reload(self) -> None:
        """Load the model again, with other options."""
        if self._load_options() != self._options:
            self.load_model(self.loaded.name if self.loaded else self._wanted)

    def edit_settings(self) -> None:
        """Show the settings."""
        screen = SettingsScreen(
            chat=self._of_chat(),
            model=self._of_model,
            everything=self._of_all,
            below=self._below_all(),
            model_title=self.loaded.title if self.loaded else "no model",
            longest_context=self.loaded.longest_context if self.loaded else None,
            between=self._command_line(),
        )
        self.push_screen(screen, self._keep_settings)

    def _keep_settings(self, result: SettingsResult | None) -> None:
        if result is None:
            return
        self._of_all = dict(result.everything)
        try:
            self.store.save_settings("", self._of_all)
            if self.loaded is not None:
                self._of_model = dict(result.model)
                self.store.save_settings(self.loaded.title, self._of_model)
            self.chat_screen.conversation.save_settings(result.chat)
        except StoreError as error:
            self.chat_screen.complain(str(error))
        self.settings_changed()

    def _apply_theme(self) -> None:
        theme = self.layers().value("theme")
        if theme in theme_names():
            self.theme = theme

    def _keep_theme(self, name: str) -> None:
        """Remember a theme that was chosen in the palette."""
        if name != self.layers().value("theme"):
            self._of_all = {**self._of_all, "theme": name}
            try:
                self.store.save_settings("", self._of_all)
            except StoreError as error:
                self.chat_screen.complain(str(error))

    def _load_options(self) -> LoadOptions:
        layers = self.layers()
        return LoadOptions(**{key: layers.value(key) for key in _RELOADED})

    # Models

    def load_model(self, name: str | None) -> None:
        """Load a model by name or file, in place of the one before."""
        self._wanted = name
        self._options = self._load_options()
        self.engine.load(name, self._options)

    def choose_model(self) -> None:
        """Show the models that there are."""
        options = self._load_options()
        current = self.loaded.name if self.loaded else self._wanted
        placement = self.loaded.placement if self.loaded else None
        freed = placement.total if placement and not placement.resident else 0
        screen = ModelsScreen(current, options.context, options.ram, freed=freed)
        self.push_screen(screen, self._chosen)

    def _chosen(self, choice: Choice | None) -> None:
        if choice is not None:
            self.chat_screen.load_model(choice.name_or_path)

    def no_model_yet(self) -> str:
        """Why nothing can be answered."""
        if self.engine.loading is not None:
            return "the model is still being loaded; send again when it is ready"
        return "no model is loaded; Ctrl+O chooses one"

    def on_chat_app_told(self, message: Told) -> None:
        """Take note of what the engine has done."""
        event = message.event
        if isinstance(event, Loaded):
            self.loaded = event
            self._options = event.options
            self._of_model = self._settings_of(event.title)
        elif isinstance(event, LoadFailed):
            self.loaded = None
        self.chat_screen.told(event)

    def _settings_of(self, title: str) -> dict[str, Any]:
        try:
            return self.store.settings(title)
        except StoreError as error:
            self.chat_screen.complain(str(error))
            return {}

    # Help

    def show_help(self) -> None:
        """List all keys and commands."""
        commands = [(f"/{c.name}", c.summary) for c in self.chat_screen.commands.all]
        self.push_screen(HelpScreen(key_groups(), commands))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """What the palette offers: the keys of the chat, then Textual's own."""
        if screen is self.chat_screen:
            chat = self.chat_screen
            yield SystemCommand("New chat", "Begin another chat", chat.action_new)
            yield SystemCommand("Chats", "List and search the chats", chat.action_chats)
            yield SystemCommand("Model", "Choose, download or remove a model", chat.action_models)
            yield SystemCommand("Settings", "Sampling, memory, look", chat.action_settings)
            yield SystemCommand("Machine", "What the machine does", chat.action_machine)
            yield SystemCommand("Answer again", "Regenerate the reply", chat.action_regenerate)
            yield SystemCommand("Go on", "Continue a reply that was cut", chat.action_continue)
            yield SystemCommand("Copy", "Copy the last reply", chat.action_copy_last)
            yield SystemCommand("Suspend", "Back to the shell; fg returns", self._suspend)
            yield SystemCommand("Help", "All keys and commands", chat.action_help)
        yield from super().get_system_commands(screen)

    async def _suspend(self) -> None:
        await self.run_action("suspend_process")


def run(launch: Launch) -> None:
    """Run the app until the user leaves. Raises `StoreError` where chats cannot be kept."""
    install()
    with ConversationStore() as store:
        store.purge()
        ChatApp(launch, store).run()

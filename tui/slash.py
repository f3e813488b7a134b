"""The slash commands of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localds.catalog.installed import find_installed
from localds.catalog.known import known_models
from localds.settings import write_whole
from tui.settings import BY_KEY
from tui.store.export import from_json, to_json, to_markdown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tui.screens.chat import ChatScreen

_MOST_IMPORTED = 256 << 20  # bytes


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """`run` takes what stands after the name; `completions` gives all arguments there are."""

    name: str
    summary: str
    run: Callable[[str], None]
    completions: Callable[[], Sequence[str]] = tuple

    def complete(self, prefix: str) -> list[str]:
        """The arguments that begin with `prefix`."""
        return [text for text in self.completions() if text.lower().startswith(prefix.lower())]


class SlashCommands:
    """The commands, on one chat screen. Those that fail raise `ValueError` or `OSError`."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self.all = (
            SlashCommand("model", "load a model, or choose one", self._model, _model_names),
            SlashCommand("system", "set the system prompt of this chat", self._system),
            SlashCommand(
                "set",
                "change a setting of this chat: /set temperature 0.7; nothing resets it",
                self._set,
                _settings,
            ),
            SlashCommand("settings", "all settings", lambda _: screen.action_settings()),
            SlashCommand("new", "begin another chat", lambda _: screen.action_new()),
            SlashCommand("save", "keep this chat under a name", self._save),
            SlashCommand(
                "load", "open a chat by its name, or an exported file", self._load, self._titles
            ),
            SlashCommand("export", "write this chat to a file, .md or .json", self._export),
            SlashCommand("regenerate", "answer again", lambda _: screen.action_regenerate()),
            SlashCommand(
                "continue", "go on with a reply that was cut", lambda _: screen.action_continue()
            ),
            SlashCommand("copy", "copy the last reply", lambda _: screen.action_copy_last()),
            SlashCommand("stats", "figures of the last reply", self._stats),
            SlashCommand("help", "keys and commands", lambda _: screen.action_help()),
            SlashCommand("bye", "leave", lambda _: screen.app.exit()),
        )
        self._by_name = {command.name: command for command in self.all}
        self._by_name |= {"quit": self._by_name["bye"], "exit": self._by_name["bye"]}
        self._by_name["clear"] = self._by_name["new"]

    def run(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, rest = line[1:].partition(" ")
        command = self._by_name.get(name.strip().lower())
        if command is None:
            raise ValueError(f"/{name}: there is no such command; /help lists them")
        command.run(rest.strip())

    def _model(self, name: str) -> None:
        if name:
            self._screen.load_model(name)
        else:
            self._screen.action_models()

    def _system(self, text: str) -> None:
        self._screen.change_setting("system", text or None)
        self._screen.tell("The system prompt is set." if text else "There is no system prompt now.")

    def _set(self, line: str) -> None:
        key, _, text = line.partition(" ")
        if not key:
            raise ValueError("/set: give a setting and its value, like /set temperature 0.7")
        if key not in BY_KEY:
            raise ValueError(f"/set {key}: no such setting; there are {', '.join(BY_KEY)}")
        value = BY_KEY[key].parse(text)
        self._screen.change_setting(key, value)
        shown = "as before this chat" if value is None else BY_KEY[key].format(value)
        self._screen.tell(f"{BY_KEY[key].label}: {shown}")

    def _save(self, title: str) -> None:
        if not title:
            raise ValueError("/save: give the chat a name, like /save Holiday plans")
        self._screen.rename(title)
        empty = self._screen.conversation.id is None
        when = " from its first message on" if empty else ""
        self._screen.tell(f"This chat is kept as {title}{when}; /load {title} opens it.")

    def _titles(self) -> list[str]:
        return [found.title for found in self._screen.store.conversations() if found.title]

    def _load(self, name: str) -> None:
        if not name:
            self._screen.action_chats()
            return
        path = Path(name).expanduser()
        if path.suffix == ".json" and path.is_file():
            if path.stat().st_size > _MOST_IMPORTED:
                raise ValueError(f"/load {name}: too large for an exported chat")
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"/load {name}: this is no exported chat, but no text") from None
            self._screen.open_chat(from_json(self._screen.store, text).id)
            return
        found = [c for c in self._screen.store.conversations() if c.title.lower() == name.lower()]
        if not found:
            raise ValueError(
                f"/load {name}: no chat has this name, and there is no such .json file"
            )
        self._screen.open_chat(found[0].id)

    def _export(self, name: str) -> None:
        conversation = self._screen.conversation
        if conversation.id is None:
            raise ValueError("/export: this chat has no messages yet")
        path = Path(name or f"{_file_name(conversation.title)}.md").expanduser()
        store = self._screen.store
        match path.suffix:
            case ".json":
                text = to_json(store, conversation.id)
            case ".md":
                text = to_markdown(store.conversation(conversation.id), conversation.messages)
            case _:
                raise ValueError(f"/export {path}: the name must end in .md or .json")
        if path.exists():
            raise ValueError(f"/export {path}: there is such a file already; give another name")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"/export {path}: there is no folder {path.absolute().parent}")
        write_whole(path.absolute(), text)
        self._screen.tell(f"Written to {path}")

    def _stats(self, _: str) -> None:
        self._screen.tell(self._screen.figures())


def _settings() -> list[str]:
    keys = list(BY_KEY)
    return keys + [f"{s.key} {choice}" for s in BY_KEY.values() for choice in s.choices]


def _model_names() -> list[str]:
    installed = [model.name for model in find_installed()]
    return [*installed, *(name for name in known_models() if name not in installed)]


def _file_name(title: str) -> str:
    """A title as a file's name."""
    kept = "".join(c if c.isalnum() or c in "-_ " else " " for c in title)
    return "-".join(kept.split())[:60] or "chat"

"""The values behind the settings screen: what was given, what was edited, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from tui.settings import Layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tui.settings import Setting

Scope = Literal["chat", "model", "everything"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SOURCES: Mapping[Scope, str] = {
    "chat": "this chat",
    "model": "this model",
    "everything": "all models",
}


@dataclass(frozen=True, slots=True)
class SettingsResult:
    """The three scopes as they are now; `reload` where the model has to be loaded again."""

    chat: dict[str, Any]
    model: dict[str, Any]
    everything: dict[str, Any]
    reload: bool


class Draft:
    """Edits of three scopes, as texts. A value that was not edited stays exactly as it was given.

    `between` are layers under this chat and over this model, `below` those under all three, the
    most specific first. `longest_context`, in tokens, is the model's own limit, which "all models"
    need not keep.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        given: Mapping[Scope, Mapping[str, Any]],
        below: Sequence[tuple[str, Mapping[str, Any]]],
        longest_context: int | None,
        between: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        self.settings = settings
        self._by_key = {setting.key: setting for setting in settings}
        self._given = {scope: dict(given[scope]) for scope in SCOPES}
        self._edits: dict[Scope, dict[str, str]] = {scope: {} for scope in SCOPES}
        self._below = below
        self._between = between
        self._longest_context = longest_context

    @property
    def changed(self) -> bool:
        """Whether anything was edited."""
        return any(self._edits.values())

    def text(self, scope: Scope, key: str) -> str:
        """What the field shows; empty for "not set"."""
        return self._edits[scope].get(key, self._given_text(scope, key))

    def edit(self, scope: Scope, key: str, text: str) -> None:
        """Take the text of a field. The text given at the beginning brings its value back."""
        if text == self.text(scope, key):
            return
        if text == self._given_text(scope, key):
            del self._edits[scope][key]
        else:
            self._edits[scope][key] = text

    def reset(self, scope: Scope) -> None:
        """Let nothing be set in this scope. Keys that are no settings stay."""
        given = self._given[scope]
        self._edits[scope] = {k: "" for k in self._by_key if given.get(k) is not None}

    def problem(self, scope: Scope, key: str) -> str | None:
        """What is wrong with this field; None where nothing is."""
        setting = self._by_key[key]
        try:
            value = self._value(scope, setting)
        except ValueError as error:
            return str(error).removeprefix(f"{key}: ")
        longest = self._longest_context
        too_long = key == "context" and scope != "everything" and value and longest
        if too_long and value > longest:
            return f"{value} is too large; this model was made for at most {longest} tokens"
        return None

    def first_problem(self, first: Scope) -> tuple[Scope, str] | None:
        """Scope and key of a field that is wrong, looking in the scope `first` first."""
        for scope in (first, *SCOPES):
            for setting in self.settings:
                if self.problem(scope, setting.key) is not None:
                    return scope, setting.key
        return None

    def problems(self) -> int:
        """How many fields are wrong."""
        pairs = ((scope, setting.key) for scope in SCOPES for setting in self.settings)
        return sum(self.problem(*pair) is not None for pair in pairs)

    def without(self, scope: Scope) -> dict[str, str]:
        """By key: what counts where this scope leaves the field empty, and where it comes from."""
        lower = SCOPES[SCOPES.index(scope) + 1 :]
        between = self._between if scope == "chat" else ()
        found = [*between, *self._layers(lower, edited=True), *self._below]
        layers = Layers(found, self.settings)
        return {s.key: _told(s, layers.value(s.key), layers.source(s.key)) for s in self.settings}

    def is_blank_but_set(self, scope: Scope, key: str) -> bool:
        """Whether a value that looks like nothing, such as an empty text, was given and kept."""
        kept = key not in self._edits[scope] and self._given[scope].get(key) is not None
        return kept and not self.text(scope, key).strip()

    def result(self) -> SettingsResult:
        """The values of the three scopes. Raises `ValueError` while any field is wrong."""
        scopes = {scope: self._scope_values(scope) for scope in SCOPES}
        before, after = self._all_layers(edited=False), self._all_layers(edited=True)
        reload = any(
            before.value(setting.key) != after.value(setting.key)
            for setting in self.settings
            if setting.needs_reload
        )
        return SettingsResult(**scopes, reload=reload)

    def _all_layers(self, *, edited: bool) -> Layers:
        chat, *lower = self._layers(SCOPES, edited=edited)
        return Layers([chat, *self._between, *lower, *self._below], self.settings)

    def _given_text(self, scope: Scope, key: str) -> str:
        value = self._given[scope].get(key)
        if value is None:
            return ""
        setting = self._by_key[key]
        try:
            return setting.format(setting.check(value))
        except ValueError:
            return str(value)

    def _value(self, scope: Scope, setting: Setting) -> Any:
        if setting.key in self._edits[scope]:
            return setting.parse(self._edits[scope][setting.key])
        value = self._given[scope].get(setting.key)
        return None if value is None else setting.check(value)

    def _scope_values(self, scope: Scope) -> dict[str, Any]:
        values = dict(self._given[scope])
        for key, text in self._edits[scope].items():
            value = self._by_key[key].parse(text)
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value
        return values

    def _layers(
        self, scopes: Sequence[Scope], *, edited: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for scope in scopes:
            values = dict(self._given[scope])
            if edited:
                values |= {key: self._parsed(key, text) for key, text in self._edits[scope].items()}
            yield SOURCES[scope], values

    def _parsed(self, key: str, text: str) -> Any:
        """The value of a text; None for one that is wrong, as if it were not set."""
        try:
            return self._by_key[key].parse(text)
        except ValueError:
            return None


def _told(setting: Setting, value: Any, source: str) -> str:
    """A value on one line, and its source: "0.6 · the model's file"."""
    text = " ".join(setting.format(value).split())
    if not text:
        return "not set"
    return f"{text if len(text) <= 60 else text[:59] + '…'} · {source}"

"""The settings screen: one scope at a time, each field checked as it is typed."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static, Tab, Tabs

from tui.literal import literal
from tui.screens.dialogs import Confirm
from tui.screens.settings_draft import SCOPES, Draft, Scope, SettingsResult
from tui.settings import SETTINGS
from tui.widgets.setting_field import SettingField

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from textual.app import ComposeResult
    from textual.binding import BindingType
    from textual.widget import Widget

    from tui.settings import Setting

__all__ = ["SettingsResult", "SettingsScreen"]

_TITLES: Mapping[Scope, str] = {
    "chat": "This chat",
    "model": "This model",
    "everything": "All models",
}
_HINT = "F6  next scope"
_RELOAD = "applies when the model is loaded again"


class SettingsScreen(ModalScreen[SettingsResult | None]):
    """Edits the settings of this chat, of this model and of all models; None where nothing is kept.

    `below` are the layers under these three, the most specific first, each with a name such as
    "the model's file"; `between` are those over this model. `longest_context` is the model's own
    limit in tokens.
    """

    CSS_PATH = "settings.tcss"
    AUTO_FOCUS = "SettingField Input"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012  Textual's own type
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save and close"),
        Binding("escape", "close", "Close"),
        Binding("f5", "reset", "Reset this scope"),
        Binding("f6,ctrl+pagedown", "scope(1)", "Next scope"),
        Binding("ctrl+pageup", "scope(-1)", "Previous scope"),
    ]

    def __init__(
        self,
        chat: Mapping[str, Any],
        model: Mapping[str, Any],
        everything: Mapping[str, Any],
        below: Sequence[tuple[str, Mapping[str, Any]]],
        model_title: str,
        longest_context: int | None,
        between: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        super().__init__()
        self._settings = SETTINGS
        given: dict[Scope, Mapping[str, Any]] = {
            "chat": chat,
            "model": model,
            "everything": everything,
        }
        self._draft = Draft(self._settings, given, below, longest_context, between)
        self._model_title = model_title
        self._scope: Scope = "chat"

    def compose(self) -> ComposeResult:
        """Title, scopes, the fields in two columns, help for the one in focus, buttons."""
        with Vertical(id="frame"):
            yield Static(literal(f"Settings · {self._model_title}"), id="title", markup=False)
            yield Tabs(*(Tab(_TITLES[scope], id=scope) for scope in SCOPES))
            with VerticalScroll(id="form", can_focus=False), Horizontal(id="columns"):
                for column in _columns(self._settings):
                    with Vertical(classes="column"):
                        yield from column
            yield Static(id="help", markup=False)
            with Horizontal(id="buttons"):
                yield Static(_HINT, id="status", markup=False)
                yield _button("Save", "Ctrl+S", "save")
                yield _button("Reset", "F5", "reset")
                yield _button("Close", "Esc", "close")

    def on_mount(self) -> None:
        """Fill the fields."""
        self.watch(self, "focused", self._show_help)
        self._load()

    def action_save(self) -> None:
        """Close with the result, or go to the first field that is wrong."""
        self._take_all()
        wrong = self._draft.first_problem(self._scope)
        if wrong is None:
            self.dismiss(self._draft.result())
            return
        scope, key = wrong
        self._go_to(scope)
        count = self._draft.problems()
        told = "a field is wrong" if count == 1 else f"{count} fields are wrong"
        self._show_status(f"! Not saved: {told}")
        self.query_one(f"#setting-{key}", SettingField).focus_editor()

    def action_close(self) -> None:
        """Close without a result; asks first where something was changed."""
        self._take_all()
        if not self._draft.changed:
            self.dismiss(None)
            return
        question = Confirm("Close without saving the changes?", yes="Discard", no="Go on")
        self.app.push_screen(question, self._close_if)

    def action_reset(self) -> None:
        """Let nothing be set in the scope that is shown."""
        self._draft.reset(self._scope)
        self._load()

    def action_scope(self, step: int) -> None:
        """Show the scope so many to the right, around the end."""
        self._go_to(SCOPES[(SCOPES.index(self._scope) + step) % len(SCOPES)])

    @on(Button.Pressed)
    async def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        await self.run_action(str(event.button.id))

    @on(Tabs.TabActivated)
    def _tab_activated(self) -> None:
        # The tab of now, not of the message: after two quick keys the message tells of the first.
        active = self.query_one(Tabs).active
        for scope in SCOPES:
            if scope == active and scope != self._scope:
                self._show_scope(scope)

    @on(SettingField.Changed)
    def _field_changed(self, event: SettingField.Changed) -> None:
        key = event.field.setting.key
        self._draft.edit(self._scope, key, event.field.text)
        event.field.show_problem(self._draft.problem(self._scope, key))
        if self._draft.first_problem(self._scope) is None:
            self._show_status(None)

    @on(Input.Submitted)
    def _line_submitted(self) -> None:
        self.focus_next()

    def _close_if(self, sure: bool | None) -> None:
        if sure:
            self.dismiss(None)

    def _go_to(self, scope: Scope) -> None:
        if scope != self._scope:
            self._show_scope(scope)
            self.query_one(Tabs).active = scope

    def _show_scope(self, scope: Scope) -> None:
        self._take_all()
        self._scope = scope
        self._load()

    def _take_all(self) -> None:
        """Take what the fields hold: messages about the last keys may still be under way."""
        for field in self.query(SettingField):
            self._draft.edit(self._scope, field.setting.key, field.text)

    def _load(self) -> None:
        """Fill the fields with the scope's texts."""
        without = self._draft.without(self._scope)
        for field in self.query(SettingField):
            key = field.setting.key
            blank = self._draft.is_blank_but_set(self._scope, key)
            field.load(self._draft.text(self._scope, key), "empty here" if blank else without[key])
            field.show_problem(self._draft.problem(self._scope, key))

    def _show_status(self, problem: str | None) -> None:
        status = self.query_one("#status", Static)
        status.update(_HINT if problem is None else problem)
        status.set_class(problem is not None, "-wrong")

    def _show_help(self, focused: Widget | None) -> None:
        field = None
        if focused is not None:
            field = next((n for n in focused.ancestors if isinstance(n, SettingField)), None)
        self.query_one("#help", Static).update("" if field is None else _help(field.setting))


def _columns(settings: Sequence[Setting]) -> tuple[list[Widget], list[Widget]]:
    """The first section, then all others: in a wide terminal these stand side by side."""
    first, *others = (list(fields) for _, fields in groupby(settings, lambda s: s.section))
    return _section(first), [widget for fields in others for widget in _section(fields)]


def _section(fields: Sequence[Setting]) -> list[Widget]:
    return [_heading(fields[0].section, fields), *map(SettingField, fields)]


def _heading(section: str, fields: Sequence[Setting]) -> Static:
    note = f" · {_RELOAD}" if all(field.needs_reload for field in fields) else ""
    return Static(
        Content(section) + Content.styled(note, "not bold $foreground-muted"), classes="heading"
    )


def _help(setting: Setting) -> str:
    return f"{setting.help} It {_RELOAD}." if setting.needs_reload else setting.help


def _button(text: str, key: str, action: str) -> Button:
    label = Content(text) + Content.styled(f"  {key}", "dim")
    return Button(label, id=action, compact=True)

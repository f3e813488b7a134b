"""One setting: its label, an editor that fits its kind, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, Select, Static, TextArea

from tui.literal import literal
from tui.widgets.literal_editors import LiteralInput, LiteralTextArea

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

    from tui.settings import Setting


@dataclass(frozen=True, slots=True)
class Unset:
    """The value of the option "not set"; `without` tells what counts then."""

    without: str

    def label(self) -> Content:
        """How the option reads."""
        told = self.without if self.without == "not set" else f"not set: {self.without}"
        return Content.styled(literal(told), "$foreground-muted")


class SettingField(Vertical):
    """Edits the text of one setting; an empty one means "not set".

    Posts `Changed` after every change, `load` included.
    """

    DEFAULT_CSS = """
    SettingField {
        height: auto;

        & > Horizontal { height: auto; }
        & .mark { width: 2; visibility: hidden; color: $primary; text-style: bold; }
        & .label { width: 20; height: 1; }
        &.-focused .mark { visibility: visible; }
        &.-focused .label { text-style: bold; }
        &.-wrong .mark { visibility: visible; color: $error; }
        & > .problem { display: none; height: auto; margin-left: 23; color: $error; }
        &.-wrong > .problem { display: block; }
        &.-wrong LiteralInput, &.-wrong LiteralTextArea { border-left: outer $error; }
        & Select, & LiteralInput, & LiteralTextArea { width: 1fr; }
    }
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "app.focus_previous", "Previous field", show=False),
        Binding("down", "app.focus_next", "Next field", show=False),
    ]

    class Changed(Message):
        """The text of a field changed."""

        def __init__(self, field: SettingField) -> None:
            super().__init__()
            self.field = field

        @property
        def control(self) -> SettingField:
            """The field."""
            return self.field

    def __init__(self, setting: Setting) -> None:
        super().__init__(id=f"setting-{setting.key}")
        self.setting = setting
        self._loaded: tuple[str, str] = ("", "")
        self._editor = _editor(setting)

    def compose(self) -> ComposeResult:
        """Mark, label and editor in one row; the problem below."""
        with Horizontal():
            yield Static("▸", classes="mark", markup=False)
            yield Static(self.setting.label, classes="label", markup=False)
            yield self._editor
        yield Static(classes="problem", markup=False)

    @property
    def text(self) -> str:
        """The text; the one that was loaded exactly as it was, while nobody changed it."""
        given, shown = self._loaded
        now = self._editor_text()
        return given if now == shown else now

    def load(self, text: str, without: str) -> None:
        """Show a text, and `without`: what counts where it is empty."""
        match self._editor:
            case Select() as select:
                select.set_options(_options(self.setting, text, Unset(without)))
                if text:
                    select.value = text
            case TextArea() as area:
                area.placeholder = Content(literal(without))
                area.load_text(text)
            case Input() as line:
                line.placeholder = literal(without)
                line.value = text
        self._loaded = (text, self._editor_text())

    def show_problem(self, problem: str | None) -> None:
        """Show what is wrong; None for nothing."""
        self.set_class(problem is not None, "-wrong")
        self.query_one(".mark", Static).update("▸" if problem is None else "!")
        self.query_one(".problem", Static).update("" if problem is None else literal(problem))

    def focus_editor(self) -> None:
        """Give the focus to the editor and bring it into view."""
        self._editor.focus()
        self.scroll_visible(animate=False)

    # Textual restyles only the field itself when `:focus-within` changes, not what is in it.
    def on_descendant_focus(self) -> None:
        """Mark the field."""
        self.add_class("-focused")

    def on_descendant_blur(self) -> None:
        """Unmark the field."""
        self.remove_class("-focused")

    @on(Input.Changed)
    @on(TextArea.Changed)
    @on(Select.Changed)
    def _editor_changed(self, event: Message) -> None:
        event.stop()
        self.post_message(self.Changed(self))

    def _editor_text(self) -> str:
        match self._editor:
            case Select() as select:
                return select.value if isinstance(select.value, str) else ""
            case TextArea() as area:
                return area.text
            case Input() as line:
                return line.value


class ChoiceSelect(Select[str | Unset], inherit_bindings=False):
    """A `Select` of one row, with an option for "not set". Up and down leave it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,space", "show_overlay", "Show the choices", show=False)
    ]
    DEFAULT_CSS = """
    ChoiceSelect {
        border: none;
        border-left: vkey $border-blurred;
        & > SelectCurrent { border: none; height: 1; padding: 0 1 0 0; background: $panel; }
        &:focus { border-left: outer $border; }
        &:focus > SelectCurrent { border: none; background-tint: $foreground 8%; }
        & > SelectOverlay { max-height: 10; border: round $border; }
    }
    """


def _editor(setting: Setting) -> LiteralInput | LiteralTextArea | ChoiceSelect:
    match setting.kind:
        case "switch" | "choice":
            return ChoiceSelect(_options(setting, "", Unset("")), allow_blank=False)
        case "text" | "lines":
            return LiteralTextArea(soft_wrap=True)
        case _:
            return LiteralInput(select_on_focus=False)


def _options(setting: Setting, text: str, unset: Unset) -> list[tuple[Content | Text, str | Unset]]:
    """Not set, then the values; also `text`, where it is none of them, so that it can be shown."""
    values = ["yes", "no"] if setting.kind == "switch" else list(setting.choices)
    if text and text not in values:
        values.append(text)
    # Typing searches the options that are a `Text`.
    return [(unset.label(), unset), *((Text(literal(value)), value) for value in values)]

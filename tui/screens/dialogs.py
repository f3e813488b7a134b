"""Small questions and messages in front of the screen that asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from tui.literal import literal
from tui.widgets.literal_editors import LiteralInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult
    from textual.binding import BindingType
    from textual.widgets import Input


class Confirm(ModalScreen[bool]):
    """Asks before something that cannot be taken back; True for yes.

    The focus begins on "no", so that Enter pressed too early does no harm.
    """

    CSS_PATH = "dialogs.tcss"
    AUTO_FOCUS = "#no"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
        Binding("left", "app.focus_previous", "Previous button", show=False),
        Binding("right", "app.focus_next", "Next button", show=False),
        Binding("up", "scroll(-1)", "Scroll up", show=False),
        Binding("down", "scroll(1)", "Scroll down", show=False),
        Binding("pageup", "scroll(-8)", "Scroll up by eight lines", show=False),
        Binding("pagedown", "scroll(8)", "Scroll down by eight lines", show=False),
    ]

    def __init__(self, question: str, yes: str = "Delete", no: str = "Cancel") -> None:
        super().__init__()
        self._question = question
        self._yes, self._no = yes, no

    def compose(self) -> ComposeResult:
        """The question above its two answers."""
        with Vertical(classes="dialog"):
            yield _Message(self._question)
            with Horizontal(classes="buttons"):
                yield _button(self._yes, "y", "yes")
                yield _button(self._no, "n", "no")

    def action_answer(self, yes: bool) -> None:
        """Close with the answer."""
        self.dismiss(yes)

    def action_scroll(self, lines: int) -> None:
        """Scroll a question too long for the screen."""
        self.query_one(_Message).scroll_relative(y=lines, animate=False)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")


class AskText(ModalScreen[str | None]):
    """Asks for one line of text; None where it was cancelled.

    `validate` returns what is wrong with a text, or None. It runs at every key, so it must be
    quick; while it objects, the dialog stays open.
    """

    CSS_PATH = "dialogs.tcss"
    AUTO_FOCUS = "Input"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Cancel")]

    def __init__(
        self,
        question: str,
        text: str = "",
        validate: Callable[[str], str | None] | None = None,
    ) -> None:
        super().__init__()
        self._question = question
        self._text = text
        self._objection = validate or (lambda _: None)

    def compose(self) -> ComposeResult:
        """The question, the field, what is wrong with it, and the buttons."""
        with Vertical(classes="dialog"):
            yield _Message(self._question)
            yield LiteralInput(self._text)
            yield Static(id="objection", markup=False)
            with Horizontal(classes="buttons"):
                yield _button("OK", "Enter", "ok")
                yield _button("Cancel", "Esc", "cancel")

    def action_cancel(self) -> None:
        """Close without a text."""
        self.dismiss(None)

    @on(LiteralInput.Changed)
    def _changed(self, event: Input.Changed) -> None:
        # The text given in the constructor is not the user's mistake.
        if event.value != self._text or self.query_one("#objection").display:
            self._show_objection(self._objection(event.value))

    @on(LiteralInput.Submitted)
    @on(Button.Pressed, "#ok")
    def _submitted(self) -> None:
        text = self.query_one(LiteralInput).value
        objection = self._objection(text)
        if objection is None:
            self.dismiss(text)
            return
        self._show_objection(objection)
        self.query_one(LiteralInput).focus()

    @on(Button.Pressed, "#cancel")
    def _cancelled(self) -> None:
        self.dismiss(None)

    def _show_objection(self, objection: str | None) -> None:
        line = self.query_one("#objection", Static)
        line.display = objection is not None
        line.update(literal(f"! {objection}") if objection is not None else "")
        self.query_one(LiteralInput).set_class(objection is not None, "-wrong")


class ErrorDialog(ModalScreen[None]):
    """Tells what went wrong. Long messages wrap and scroll; `c` copies the message as it is."""

    CSS_PATH = "dialogs.tcss"
    AUTO_FOCUS = "#message"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "copy", "Copy the message"),
        Binding("escape,enter", "close", "Close"),
    ]

    def __init__(self, title: str, message: str) -> None:
        super().__init__()
        self._title = title
        self._message = message

    def compose(self) -> ComposeResult:
        """The title above the message, which takes the focus so that the arrow keys scroll it."""
        with Vertical(classes="dialog -error"):
            yield Static(literal(f"! {self._title}"), id="title", markup=False)
            yield _Message(self._message, scroll_by_keys=True)
            with Horizontal(classes="buttons"):
                yield _button("Copy", "c", "copy")
                yield _button("Close", "Esc", "close")

    def action_copy(self) -> None:
        """Put the message into the clipboard."""
        self.app.copy_to_clipboard(self._message)
        self.query_one("#copy", Button).label = _label("Copied", "c")

    def action_close(self) -> None:
        """Close the dialog."""
        self.dismiss(None)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "copy":
            self.action_copy()
        else:
            self.dismiss(None)


class _Message(VerticalScroll):
    """A text of any length, as tall as it is up to what the screen allows."""

    def __init__(self, text: str, *, scroll_by_keys: bool = False) -> None:
        super().__init__(id="message", can_focus=scroll_by_keys)
        self._text = text

    def compose(self) -> ComposeResult:
        yield Static(literal(self._text), markup=False)


def _button(text: str, key: str, identity: str) -> Button:
    return Button(_label(text, key), id=identity, compact=True)


def _label(text: str, key: str) -> Content:
    return Content(literal(text)) + Content.styled(f"  {key}", "dim")

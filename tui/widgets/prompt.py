"""The input of a conversation: text, attachments, completions and earlier inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.actions import SkipAction
from textual.binding import Binding
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import TextArea

from localds.units import format_size
from tui.attachments import LIMIT_BYTES, pasted_name
from tui.completion import AttachedPath, attached_paths, mentions, mentions_of, resolve
from tui.input_history import InputHistory
from tui.store.records import Attachment
from tui.widgets.chips import Chip, Chips
from tui.widgets.completion_list import ROWS
from tui.widgets.completions import Completions
from tui.widgets.prompt_editor import PromptEditor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Self

    from textual.app import ComposeResult
    from textual.binding import BindingType

    from tui.completion import Command

PLACEHOLDER = "Write a message · Enter sends, Ctrl+J new line, / commands, @ files"
_PASTE_CHARACTERS = 2000
_PASTE_LINES = 30
# Textual lays out a line of this length in a tenth of a second at each key.
_EDITABLE_CHARACTERS = 100_000
_BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+")


@dataclass(frozen=True, slots=True)
class _Draft:
    text: str
    chips: tuple[Chip, ...]


class Prompt(Vertical):
    r"""Where messages are written.

    Enter sends; Ctrl+J, Shift+Enter, or a backslash before Enter begin a new line. Up in
    the first row and Down in the last walk through `history`. Backspace at the very beginning
    removes the last attachment; Ctrl+Z right after a long paste turns it back into text.
    """

    DEFAULT_CSS = """
    Prompt {
        height: auto;
        border: solid $border-blurred;
        &:focus-within { border: solid $border; }
    }
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send", show=False),
        Binding("ctrl+j,shift+enter", "newline", "New line", show=False),
        Binding("tab", "complete", "Complete", show=False),
        Binding("up", "earlier", "Earlier input", show=False),
        Binding("down", "later", "Later input", show=False),
        Binding("pageup", f"choose(-{ROWS})", "Completions: page up", show=False),
        Binding("pagedown", f"choose({ROWS})", "Completions: page down", show=False),
        Binding("escape", "dismiss", "Close completions", show=False),
        Binding("backspace", "remove_attachment", "Remove last attachment", show=False),
        Binding("ctrl+z,super+z", "undo_paste", "Pasted attachment to text", show=False),
    ]

    @dataclass
    class Submitted(Message):
        """A message, or a command with its slash, was sent; the prompt is empty again."""

        text: str
        attachments: tuple[Attachment, ...]

    @dataclass
    class AttachmentsChanged(Message):
        """An attachment came or went, or its length became known."""

    @dataclass
    class Failed(Message):
        """Something could not be attached or edited; the text stays."""

        message: str

    @dataclass
    class _Named(Message):
        draft: _Draft
        paths: list[AttachedPath]

    def __init__(
        self,
        *,
        placeholder: str = PLACEHOLDER,
        name: str | None = None,
        id: str | None = None,  # noqa: A002
        classes: str | None = None,
    ) -> None:
        super().__init__(name=name, id=id, classes=classes)
        self.history: list[str] = []
        self._editor = PromptEditor(self, self._take_paste, placeholder)
        self._chips = Chips()
        self._completions = Completions(self._editor)
        self._walk: InputHistory[_Draft] = InputHistory()
        self._sending: _Draft | None = None
        self._searching = False  # For the files that the text names, before it is sent.
        self._fresh_paste: tuple[Chip, str] | None = None

    def compose(self) -> ComposeResult:
        """The list of completions, the attachments, the text."""
        yield self._completions
        yield self._chips
        yield self._editor

    # What the app sets and asks.

    @property
    def commands(self) -> Sequence[Command]:
        """The slash commands that are offered."""
        return self._completions.commands

    @commands.setter
    def commands(self, commands: Sequence[Command]) -> None:
        self._completions.commands = commands

    @property
    def folder(self) -> Path:
        """What `@path` is relative to; at first the current folder."""
        return self._completions.folder

    @folder.setter
    def folder(self, folder: Path) -> None:
        self._completions.folder = folder

    @property
    def count_tokens(self) -> Callable[[str], int] | None:
        """Counts tokens, in a worker; None before a model is loaded: lengths are estimated."""
        return self._chips.count_tokens

    @count_tokens.setter
    def count_tokens(self, count: Callable[[str], int] | None) -> None:
        self._chips.count_tokens = count

    @property
    def text(self) -> str:
        """What is written."""
        return self._editor.text

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The attachments that are read and counted."""
        return self._chips.attachments

    def set_text(self, text: str, attachments: Iterable[Attachment] = ()) -> None:
        """Write this instead, with the cursor at its end, to edit an earlier message.

        Attachments are taken as they are; those that the text names by `@` belong to that name.
        """
        self._stop_sending()
        self._walk.reset()
        chips = (
            Chip(a.name, text=a.text, tokens=a.tokens, mentioned=bool(mentions_of(a.name, text)))
            for a in attachments
        )
        self._show(_Draft(text, tuple(chips)))

    def clear(self) -> None:
        """Empty the prompt; attachments go too."""
        self.set_text("")

    def focus(self, scroll_visible: bool = True) -> Self:
        """Put the cursor into the text."""
        self._editor.focus(scroll_visible)
        return self

    # Sending.

    def action_submit(self) -> None:
        """Accept the chosen completion, or send."""
        self._completions.look()
        if self._sending is not None or self._completions.take_enter():
            return
        if self._editor.behind_backslash:
            row, column = self._editor.cursor_location
            self._editor.write("\n", (row, column - 1), (row, column))
            return
        draft = self._draft()
        if draft.text.strip() or draft.chips:
            self._send(draft)

    def action_newline(self) -> None:
        """Begin a new line at the cursor."""
        if not self._editor.read_only:
            self._editor.write("\n", *self._editor.selection)

    def _send(self, draft: _Draft) -> None:
        self._completions.close()
        self._sending = draft
        self._editor.read_only = True
        self.set_timer(0.3, self._tell_of_reading)
        known = {m.start for chip in draft.chips for m in mentions_of(chip.name, draft.text)}
        if all(mention.start in known for mention in mentions(draft.text)):
            self._send_when_settled()
        else:
            self._searching = True
            self._find_named(draft, self.folder)

    @work(thread=True, group="prompt-paths")
    def _find_named(self, draft: _Draft, folder: Path) -> None:
        self.post_message(self._Named(draft, attached_paths(draft.text, folder)))

    @on(_Named)
    def _named(self, message: _Named) -> None:
        message.stop()
        if message.draft is not self._sending:
            return
        self._searching = False
        self._add_files(message.paths)
        self._send_when_settled()

    def _add_files(self, paths: Iterable[AttachedPath]) -> None:
        present = {chip.name for chip in self._chips.chips}
        for found in paths:
            if found.name not in present:
                self._chips.add(Chip(found.name, path=found.path, mentioned=True))

    def _send_when_settled(self) -> None:
        if self._sending is None or self._searching or not self._chips.settled:
            return
        text = _BLANK_LINES.sub("", self._sending.text).rstrip()
        attachments = self.attachments
        if text and self.history[-1:] != [text]:
            self.history.append(text)
        self.clear()
        self.post_message(self.Submitted(text, attachments))

    def _stop_sending(self) -> None:
        self._sending = None
        self._searching = False
        self._editor.read_only = False
        self._chips.note = ""

    def _tell_of_reading(self) -> None:
        if self._sending is not None:
            self._chips.note = "reading files … Esc stops"

    # Attachments.

    @on(Chips.Changed)
    def _chips_changed(self, message: Chips.Changed) -> None:
        message.stop()
        self.post_message(self.AttachmentsChanged())
        self._send_when_settled()

    @on(Chips.Failed)
    def _chip_failed(self, message: Chips.Failed) -> None:
        message.stop()
        self._stop_sending()
        self.post_message(self.Failed(message.error))

    @on(Chips.CrossClicked)
    def _cross_clicked(self, message: Chips.CrossClicked) -> None:
        message.stop()
        self._remove(message.chip)

    def action_remove_attachment(self) -> None:
        """Remove the last attachment, where the cursor is at the very beginning."""
        if not self._chips.chips or not self._editor.at_beginning:
            raise SkipAction
        self._remove(self._chips.chips[-1])

    def _remove(self, chip: Chip) -> None:
        """Let a chip go; the `@` before its name too, or it would come back on sending."""
        if self._sending is not None:
            return
        self._chips.drop(chip)
        if chip.mentioned:
            for mention in reversed(mentions_of(chip.name, self.text)):
                self._editor.delete_at(mention.start)

    def _forget_unnamed(self) -> None:
        """Remove the chips of files that the text no longer names."""
        text = self.text
        named = (chip for chip in self._chips.chips if chip.mentioned)
        self._chips.drop(*(chip for chip in named if not mentions_of(chip.name, text)))

    def _take_paste(self, text: str) -> bool:
        """Make a long paste an attachment; whether it was long."""
        text = _unix_lines(text)
        if len(text) <= _PASTE_CHARACTERS and text.rstrip("\n").count("\n") < _PASTE_LINES:
            return False
        if len(text.encode(errors="surrogatepass")) > LIMIT_BYTES:
            self.post_message(
                self.Failed(
                    f"the pasted text has {format_size(len(text))}; at most "
                    f"{format_size(LIMIT_BYTES)} can be attached"
                )
            )
            return True
        chip = Chip(pasted_name(self._chips.free_number()), text=text)
        self._chips.add(chip)
        self._fresh_paste = (chip, self.text)
        return True

    def action_undo_paste(self) -> None:
        """Turn the attachment that was just pasted back into text at the cursor."""
        chip, before = self._fresh_paste or (None, "")
        if chip is None or chip not in self._chips.chips or before != self.text:
            raise SkipAction
        text = chip.text or ""
        if len(text) > _EDITABLE_CHARACTERS:
            reason = f"{chip.name} is too long to edit here ({len(text)} characters)"
            self.post_message(self.Failed(f"{reason}; it stays attached"))
            return
        self._fresh_paste = None
        self._chips.drop(chip)
        self._editor.write(text, *self._editor.selection)

    # Completions.

    @on(TextArea.Changed)
    def _text_changed(self, message: TextArea.Changed) -> None:
        message.stop()
        self._forget_unnamed()
        self._completions.look()

    @on(TextArea.SelectionChanged)
    def _cursor_moved(self, message: TextArea.SelectionChanged) -> None:
        message.stop()
        self._completions.look()

    def on_descendant_blur(self) -> None:
        """No list without the cursor."""
        self._completions.close()

    @on(Completions.FileNamed)
    def _file_named(self, message: Completions.FileNamed) -> None:
        message.stop()
        if (path := resolve(message.name, self.folder)) is not None:
            self._add_files([AttachedPath(message.name, path)])

    def action_complete(self) -> None:
        """Accept the chosen completion; open the list where it is closed."""
        self._completions.look()
        if not self._completions.take_tab():
            raise SkipAction

    def action_choose(self, rows: int) -> None:
        """Move in the list."""
        if not self._completions.is_open:
            raise SkipAction
        self._completions.move(rows)

    def action_dismiss(self) -> None:
        """Close the list, or stop sending; else the key is for others."""
        if self._sending is not None:
            self._stop_sending()
        elif self._completions.is_open:
            self._completions.keep_closed()
        else:
            raise SkipAction

    # Earlier inputs.

    def action_earlier(self) -> None:
        """Move up in the list or the text; above its first row, the input before."""
        self._completions.look()
        if self._completions.is_open:
            self._completions.move(-1)
        elif not self._editor.on_first_row or not self._step(-1):
            raise SkipAction
        else:
            self._editor.move_cursor(self._editor.end_of_first_row())
            self._completions.keep_closed()

    def action_later(self) -> None:
        """Move down in the list or the text; below its last row, the input after."""
        self._completions.look()
        if self._completions.is_open:
            self._completions.move(1)
        elif not self._editor.on_last_row or not self._step(1):
            raise SkipAction

    def _step(self, step: int) -> bool:
        if self._sending is not None:
            return False
        draft = self._draft()
        found = self._walk.step(self.history, step, draft.text, draft)
        if found is None:
            return False
        self._show(found if isinstance(found, _Draft) else _Draft(found, ()))
        return True

    def _draft(self) -> _Draft:
        return _Draft(self.text, self._chips.chips)

    def _show(self, draft: _Draft) -> None:
        self._editor.load_text(_unix_lines(draft.text))
        self._editor.move_cursor(self._editor.document.end)
        self._chips.replace(draft.chips)
        self._fresh_paste = None
        self._completions.keep_closed()


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")

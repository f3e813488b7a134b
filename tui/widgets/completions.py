"""Completing what is written in an editor: a list of candidates, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textual import on, work
from textual.message import Message

from tui.completion import Candidate, Completion, Target, complete, mentions, target_at
from tui.widgets.completion_list import CompletionList

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tui.completion import Command
    from tui.widgets.prompt_editor import PromptEditor


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be completed: a target in a row of the text that reads `line`."""

    row: int
    line: str
    target: Target

    @property
    def place(self) -> tuple[int, str, int]:
        """The same while one thing is being typed."""
        return self.row, self.target.kind, self.target.start


class Completions(CompletionList):
    """The completions of an editor's text.

    Command names are found at once. Arguments and paths are looked up in a worker, one at a time
    and the newest request next, so that a slow disk never holds more than one thread.
    """

    @dataclass
    class FileNamed(Message):
        """The path of a file was completed in the text."""

        name: str

    @dataclass
    class _Found(Message):
        request: Request
        completion: Completion

    def __init__(self, editor: PromptEditor) -> None:
        super().__init__()
        self.commands: Sequence[Command] = ()
        self.folder = Path.cwd()
        self._editor = editor
        self._seen: tuple[int, int, str] | None = None
        self._asked: Request | None = None
        self._answered: Request | None = None
        self._completion = Completion(0, 0, ())
        self._working = False
        self._accept_when_found = False

    def look(self) -> None:
        """Open, renew or close the list, after the text or the cursor changed.

        A list that is closed opens by writing only, not by moving the cursor.
        """
        row, column = self._editor.cursor_location
        place = (row, column, self._editor.line)
        before, self._seen = self._seen, place
        if place == before:
            return
        moved_only = before is not None and (before[0], before[2]) == (row, place[2])
        if not moved_only or self.is_open:
            self._ask()

    def keep_closed(self) -> None:
        """Close the list, and do not open it until something is written."""
        self.close()
        self._seen = (*self._editor.cursor_location, self._editor.line)

    def close(self) -> None:
        """Hide the list and wait for no answer."""
        super().close()
        self._asked = self._answered = None
        self._accept_when_found = False

    def take_enter(self) -> bool:
        """Whether Enter was for the list: not where nothing is chosen or all is typed."""
        if not self.is_open or self.chosen is None:
            return False
        if self._asked != self._answered:
            self._accept_when_found = True
            return True
        if self._typed == self.chosen.insert:
            return False
        self._accept(self.chosen)
        return True

    def take_tab(self) -> bool:
        """Accept what is chosen, or open the list; whether there was anything to complete."""
        if self._asked != self._answered:
            self._accept_when_found = True
        elif not self.is_open:
            return self._ask()
        else:
            self._accept(self.chosen or self.candidates[0])
        return True

    @property
    def _typed(self) -> str:
        line = self._answered.line if self._answered else ""
        return line[self._completion.start : self._completion.end]

    def _ask(self) -> bool:
        """Look for completions at the cursor; whether there is anything to complete."""
        row, column = self._editor.cursor_location
        line = self._editor.line
        target = None
        if self._editor.selection.is_empty and not self._editor.read_only:
            target = target_at(line, column, first_line=row == 0)
        if target is None:
            self.close()
            return False
        self._accept_when_found = False
        request = self._asked = Request(row, line, target)
        if self._answered and self._answered.place != request.place:
            super().close()
        if target.kind == "command":
            self._show(request, complete(target, self.commands, self.folder))
        elif request != self._answered and not self._working:
            self._look_up(request)
        return True

    def _look_up(self, request: Request) -> None:
        self._working = True
        self._complete(request, self.commands, self.folder)

    @work(thread=True, group="completions")
    def _complete(self, request: Request, commands: Sequence[Command], folder: Path) -> None:
        self.post_message(self._Found(request, complete(request.target, commands, folder)))

    @on(_Found)
    def _found(self, message: _Found) -> None:
        message.stop()
        self._working = False
        if self._asked is None:
            return
        if message.request != self._asked:
            self._look_up(self._asked)
            return
        accept = self._accept_when_found
        self._show(message.request, message.completion)
        if accept and self.is_open:
            self._accept(self.chosen or self.candidates[0])

    def _show(self, request: Request, completion: Completion) -> None:
        self._answered, self._completion = request, completion
        self._accept_when_found = False
        target = request.target
        inserts = [candidate.insert for candidate in completion.candidates]
        complete_already = inserts == [self._typed] and target.kind != "command"
        if not inserts or complete_already:
            super().close()
            return
        nothing_typed = target.kind == "argument" and not target.prefix
        typed_index = inserts.index(self._typed) if self._typed in inserts else 0
        index = None if nothing_typed else typed_index
        self.open(completion.candidates, index, more=completion.more)

    @on(CompletionList.Clicked)
    def _clicked(self, message: CompletionList.Clicked) -> None:
        message.stop()
        if self._asked == self._answered:
            self._accept(message.candidate)

    def _accept(self, candidate: Candidate) -> None:
        request, completion = self._answered, self._completion
        if request is None or request.line != self._editor.line:
            return
        self.close()
        ends = request.target.kind != "argument" and not candidate.insert.endswith("/")
        followed = request.line[completion.end : completion.end + 1].isspace()
        space = " " if ends and not followed else ""
        row = request.row
        self._editor.write(candidate.insert + space, (row, completion.start), (row, completion.end))
        if ends and followed:
            self._editor.action_cursor_right()
        if request.target.kind == "argument":
            self.keep_closed()
        if request.target.kind == "path" and ends:
            self.post_message(self.FileNamed(mentions(candidate.insert)[0].name))

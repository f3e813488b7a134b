"""The attachments of the message being written, in a row above it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len
from textual import on, work
from textual.content import Content
from textual.message import Message
from textual.widget import Widget

from tui.attachments import (
    AttachmentError,
    estimate_tokens,
    one_line,
    pasted_name,
    read_attachment,
)
from tui.store.records import Attachment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from textual.events import Click
    from textual.geometry import Size
    from textual.style import Style

_MAX_ROWS = 3
_MAX_NAME = 40


@dataclass(eq=False, slots=True)
class Chip:
    """An attachment on its way: a file that is read later, or text that is counted later.

    `mentioned`: the text names it by `@name`, and it goes when the name goes.
    """

    name: str
    path: Path | None = None
    text: str | None = None
    tokens: int | None = None
    estimated: bool = False
    mentioned: bool = False

    @property
    def attachment(self) -> Attachment | None:
        """The attachment once it is read and counted."""
        if self.text is None or self.tokens is None:
            return None
        return Attachment(self.name, self.text, self.tokens)

    @property
    def size(self) -> str:
        """What is known of its length."""
        if self.tokens is None:
            return "…"
        return (
            f"{'~' if self.estimated else ''}{self.tokens} token{'s' if self.tokens != 1 else ''}"
        )


class Chips(Widget, can_focus=False):
    """Shows attachments, and reads and counts them in a worker, one after another."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {"chips--muted"}
    DEFAULT_CSS = """
    Chips {
        width: 1fr;
        height: auto;
        display: none;
        padding: 0 1;
        color: $text;
        & .chips--muted { color: $text-muted; }
    }
    """

    @dataclass
    class Changed(Message):
        """A chip came, went, or became known."""

    @dataclass
    class Failed(Message):
        """A file could not be read; its chip is gone."""

        chip: Chip
        error: str

    @dataclass
    class CrossClicked(Message):
        """Someone wants the chip gone."""

        chip: Chip

    @dataclass
    class _Loaded(Message):
        chip: Chip
        count: Callable[[str], int] | None
        outcome: Attachment | AttachmentError

    def __init__(self) -> None:
        super().__init__()
        self._chips: list[Chip] = []
        self._count: Callable[[str], int] | None = None
        self._note = ""
        self._loading = False

    @property
    def chips(self) -> tuple[Chip, ...]:
        """All chips, the oldest first."""
        return tuple(self._chips)

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """Those that are read and counted."""
        return tuple(chip.attachment for chip in self._chips if chip.attachment is not None)

    @property
    def settled(self) -> bool:
        """Whether every chip is read and counted."""
        return all(chip.attachment is not None for chip in self._chips)

    @property
    def count_tokens(self) -> Callable[[str], int] | None:
        """Counts the tokens of a text, in a worker; None: estimate. Setting it counts all anew."""
        return self._count

    @count_tokens.setter
    def count_tokens(self, count: Callable[[str], int] | None) -> None:
        if count == self._count:
            return
        self._count = count
        for chip in self._chips:
            chip.tokens = None
        self._changed()

    @property
    def note(self) -> str:
        """A remark behind the chips."""
        return self._note

    @note.setter
    def note(self, note: str) -> None:
        self._note = note
        self._redraw()

    def add(self, chip: Chip) -> None:
        """Show a chip, and read and count it when its turn comes."""
        self._chips.append(chip)
        self._changed()

    def drop(self, *chips: Chip) -> None:
        """Let chips go."""
        self.replace(chip for chip in self._chips if chip not in chips)

    def replace(self, chips: Iterable[Chip]) -> None:
        """Show these chips instead."""
        chips = list(chips)
        if chips != self._chips:
            self._chips = chips
            self._changed()

    def free_number(self) -> int:
        """The first number that no pasted text here has."""
        names = {chip.name for chip in self._chips}
        return next(n for n in range(1, len(names) + 2) if pasted_name(n) not in names)

    def _changed(self) -> None:
        self._redraw()
        self.post_message(self.Changed())
        waiting = next((chip for chip in self._chips if chip.attachment is None), None)
        if waiting is not None and not self._loading:
            self._loading = True
            self._load(waiting, self._count)

    @work(thread=True, group="chips")
    def _load(self, chip: Chip, count: Callable[[str], int] | None) -> None:
        counter = count or estimate_tokens
        outcome: Attachment | AttachmentError
        try:
            if chip.text is not None:
                outcome = Attachment(chip.name, chip.text, counter(chip.text))
            else:
                assert chip.path is not None  # noqa: S101
                outcome = read_attachment(chip.path, counter, name=chip.name)
        except AttachmentError as error:
            outcome = error
        self.post_message(self._Loaded(chip, count, outcome))

    @on(_Loaded)
    def _loaded(self, message: _Loaded) -> None:
        message.stop()
        self._loading = False
        chip = message.chip
        if isinstance(message.outcome, AttachmentError):
            if chip in self._chips:
                self._chips.remove(chip)
                self.post_message(self.Failed(chip, str(message.outcome)))
        else:
            chip.text = message.outcome.text
            if message.count == self._count:
                chip.tokens = message.outcome.tokens
                chip.estimated = message.count is None
        self._changed()

    def _redraw(self) -> None:
        self.display = bool(self._chips or self._note)
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        """As many rows as the chips need."""
        return len(self._rows(width))

    def render(self) -> Content:
        """The chips, and how many are not shown for want of room."""
        return Content("\n").join(
            Content(" ").join(piece for _, piece in row)
            for row in self._rows(self.content_size.width)
        )

    def _rows(self, width: int) -> list[list[tuple[Chip | None, Content]]]:
        """Chips and their labels, row by row; the oldest give way where rows are short."""
        muted = self.get_visual_style("chips--muted")
        pieces: list[tuple[Chip | None, Content]] = [
            (chip, _label(chip, width, muted)) for chip in self._chips
        ]
        if self._note:
            pieces.append((None, Content.styled(self._note, muted)))
        rows = _flow(pieces, width)
        hidden = 0
        while len(rows) > _MAX_ROWS:
            hidden += 1
            more = Content.styled(f"… {hidden} more", muted)
            rows = _flow([(None, more), *pieces[hidden:]], width)
        return rows

    async def _on_click(self, event: Click) -> None:
        event.stop()
        offset = event.get_content_offset(self)
        rows = self._rows(self.content_size.width)
        if offset is None or offset.y >= len(rows):
            return
        end = 0
        for chip, piece in rows[offset.y]:
            end += piece.cell_length
            # The cross is before the closing bracket; either will do.
            if chip is not None and end - 2 <= offset.x < end:
                self.post_message(self.CrossClicked(chip))
            end += 1


def _label(chip: Chip, width: int, muted: Style) -> Content:
    ends = f" · {chip.size} "
    name = one_line(chip.name)
    room = max(4, min(_MAX_NAME, width - cell_len(ends) - 3))
    if cell_len(name) > room:
        name = "…" + _last_cells(name, room - 1)
    return Content.assemble("[", (name, "bold"), (ends, muted), "x]")


def _last_cells(text: str, width: int) -> str:
    """The end of a text, in at most so many cells."""
    text = text[-width:]
    while cell_len(text) > width:
        text = text[1:]
    return text


def _flow(
    pieces: list[tuple[Chip | None, Content]], width: int
) -> list[list[tuple[Chip | None, Content]]]:
    rows: list[list[tuple[Chip | None, Content]]] = []
    used = 0
    for piece in pieces:
        length = piece[1].cell_length
        if rows and used + 1 + length <= width:
            rows[-1].append(piece)
            used += 1 + length
        else:
            rows.append([piece])
            used = length
    return rows

"""Rows of figures: a name at the left, a bar or a sparkline, and a number at the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.geometry import Size

SHORTEST = 6
"""Columns of a bar or sparkline below which the short form of the numbers is shown."""

_USUAL_NAME, _USUAL_VALUE = 12, 15

MINUTE = 60
_STEPS = "▁▂▃▄▅▆▇█"

Part = Literal["heading", "note", "label", "value", "alarm", "fill", "track"]
Run = tuple[str, Part]


@dataclass(frozen=True, slots=True)
class Heading:
    """The name of a block, and a note at the right."""

    name: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """A number by itself."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Meter:
    """A bar for `share`, 0 to 1, and its numbers; None where there is nothing to measure.

    `short` takes the place of `value` where the bar would get too short. More than 1 is marked.
    """

    name: str
    share: float | None
    value: str
    short: str = ""


@dataclass(frozen=True, slots=True)
class Trend:
    """A sparkline of the minute before `now`, and the value at its end.

    `samples` are (second, value) by the same clock as `now`, at most one for each second.
    """

    name: str
    samples: tuple[tuple[int, float], ...]
    now: int
    value: str


Row = Heading | Fact | Meter | Trend


@dataclass(frozen=True, slots=True)
class Columns:
    """Widths that the rows of a block share, so that their bars begin and end together."""

    name: int
    graphic: int
    value: int
    short: bool

    @classmethod
    def of(cls, rows: Sequence[Row], width: int) -> Columns:
        """The columns for `rows` in `width` cells; with room enough, the same for all blocks."""
        drawn = [row for row in rows if isinstance(row, Meter | Trend)]
        name = max((cell_len(row.name) for row in drawn), default=0)
        value, short = (
            max((cell_len(_value(row, short)) for row in drawn), default=0)
            for short in (False, True)
        )
        wide = cls._fit(max(name, _USUAL_NAME), max(value, _USUAL_VALUE), width, False)
        if wide.graphic >= 2 * SHORTEST:
            return wide
        for fitted in (cls._fit(name, value, width, False), cls._fit(name, short, width, True)):
            if fitted.graphic >= SHORTEST:
                return fitted
        return cls(name, 0, max(0, width - name - 1), True)

    @classmethod
    def _fit(cls, name: int, value: int, width: int, short: bool) -> Columns:
        return cls(name, width - name - value - 2, value, short)


def bar(share: float, width: int) -> tuple[str, str]:
    """The filled and the empty part of a bar, in halves of a cell.

    Only nothing looks empty, and only all looks full.
    """
    halves = min(max(round(share * width * 2), 0), width * 2)
    if 0 < share < 1:
        halves = min(max(halves, 1), width * 2 - 1)
    filled = "━" * (halves // 2) + "╸" * (halves % 2)
    return filled, "─" * (width - len(filled))


def sparkline(samples: Sequence[tuple[int, float]], now: int, width: int) -> str:
    """The last minute in at most `width` columns, scaled to its largest value.

    Columns stand for whole parts of the clock's minute, so that they keep their values as they
    move left. A column without samples is blank.
    """
    seconds = next(n for n in (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60) if MINUTE // n <= width)
    columns = MINUTE // seconds
    values: list[list[float]] = [[] for _ in range(columns)]
    for second, value in samples:
        column = columns - 1 - (now // seconds - second // seconds)
        if 0 <= column < columns:
            values[column].append(value)
    means = [sum(column) / len(column) if column else None for column in values]
    largest = max((mean for mean in means if mean is not None), default=0.0)
    return "".join(" " if mean is None else _step(mean, largest) for mean in means)


def lay_out(row: Row, columns: Columns, width: int) -> list[Run]:
    """The text of a row in `width` cells, in runs of one look."""
    match row:
        case Heading(name, note):
            return _ends((name, "heading"), (note, "note"), width)
        case Fact(name, value):
            return _ends((name, "label"), (value, "value"), width)
        case Meter() | Trend():
            return _drawn(row, columns)


def _drawn(row: Meter | Trend, columns: Columns) -> list[Run]:
    value = set_cell_size(_value(row, columns.short).rjust(columns.value), columns.value)
    runs: list[Run] = [(set_cell_size(row.name, columns.name) + " ", "label")]
    if columns.graphic:
        runs += [*_graphic(row, columns.graphic), (" ", "value")]
    over = isinstance(row, Meter) and row.share is not None and row.share > 1
    return [*runs, (value, "alarm" if over else "value")]


def _graphic(row: Meter | Trend, width: int) -> list[Run]:
    if isinstance(row, Trend):
        return [(sparkline(row.samples, row.now, width).rjust(width), "fill")]
    if row.share is None:
        return [(" " * width, "track")]
    filled, rest = bar(row.share, width)
    return [(filled, "fill"), (rest, "track")]


def _value(row: Meter | Trend, short: bool) -> str:
    if isinstance(row, Trend):
        return row.value
    mark = "! " if row.share is not None and row.share > 1 else ""
    return mark + (row.short if short and row.short else row.value)


def _ends(left: Run, right: Run, width: int) -> list[Run]:
    """Two texts at the ends of a line; the left one gives way."""
    text = set_cell_size(right[0], min(cell_len(right[0]), width))
    return [(set_cell_size(left[0], width - cell_len(text)), left[1]), (text, right[1])]


def _step(value: float, largest: float) -> str:
    if largest <= 0:
        return _STEPS[0]
    return _STEPS[min(int(value / largest * len(_STEPS)), len(_STEPS) - 1)]


class Rows(Widget):
    """A block of rows. Only lines that changed are drawn again; without rows it is not shown."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "rows--heading",
        "rows--note",
        "rows--label",
        "rows--value",
        "rows--alarm",
        "rows--fill",
        "rows--track",
    }

    DEFAULT_CSS = """
    Rows {
        width: 1fr;
        height: auto;
        & > .rows--heading { color: $text-primary; text-style: bold; }
        & > .rows--note { color: $text-muted; }
        & > .rows--label { color: $text-muted; }
        & > .rows--value { color: $foreground; }
        & > .rows--alarm { color: $text-error; text-style: bold; }
        & > .rows--fill { color: $primary; }
        & > .rows--track { color: $foreground 20%; }
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: tuple[Row, ...] = ()
        self._strips: dict[int, Strip] = {}
        self._drawn_for = (0, Columns.of((), 0))
        self.display = False

    def show(self, rows: Sequence[Row]) -> None:
        """Show these rows in place of those before."""
        before, self._rows = self._rows, tuple(rows)
        if len(before) != len(self._rows):
            self._strips.clear()
            self.display = bool(self._rows)
            self.refresh(layout=True)
            return
        width = self.size.width
        same = Columns.of(before, width) == Columns.of(self._rows, width)
        changed = [y for y, row in enumerate(self._rows) if not same or row != before[y]]
        for y in changed:
            self._strips.pop(y, None)
        if changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        """A line for each row."""
        return len(self._rows)

    def render_line(self, y: int) -> Strip:
        """The row on line `y`."""
        width = self.size.width
        columns = Columns.of(self._rows, width)
        if self._drawn_for != (width, columns):
            self._drawn_for = (width, columns)
            self._strips.clear()
        if y >= len(self._rows):
            return Strip.blank(width, self.rich_style)
        if y not in self._strips:
            runs = lay_out(self._rows[y], columns, width)
            segments = [
                Segment(text, self.get_component_rich_style(f"rows--{part}")) for text, part in runs
            ]
            self._strips[y] = Strip(segments).crop(0, width)
        return self._strips[y]

    def notify_style_update(self) -> None:
        """Forget what was drawn in another theme."""
        super().notify_style_update()
        self._strips.clear()

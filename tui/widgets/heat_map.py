"""A map of a model's routed experts: how much each works of late, and whether it is in memory."""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual.actions import SkipAction
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from tui.widgets.heat import LEVELS, NOTHING, SELECTED, Grid, Heat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from textual import events
    from textual.geometry import Size

    from localds.monitor import ExpertActivity

_CODES = SELECTED + 1

MEMORY_SHADES = "░▒▓█"
DISK_SHADES = "·:+#"
_MOST_SHADED_ROWS = 32
_LABEL_EVERY = 4


class Tinted(Widget):
    """A widget that draws in the map's two tints."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "tint--memory",
        "tint--disk",
        "tint--hottest",
        "tint--selected",
        "tint--text",
    }

    DEFAULT_CSS = """
    Tinted {
        & > .tint--memory { color: $primary; }
        & > .tint--disk { color: $warning; }
        & > .tint--hottest { color: $foreground; }
        & > .tint--selected { color: $error; text-style: bold; }
        & > .tint--text { color: $text-muted; }
    }
    """

    @property
    def shaded(self) -> bool:
        """Whether characters must tell what colours cannot in this terminal."""
        app = self.app
        few = app.console.color_system not in ("truecolor", "256")
        return app.native_ansi_color or app.no_color or few

    @cached_property
    def tints(self) -> tuple[Color, ...]:
        """The colours of all codes, from the theme."""
        ground = self.background_colors[1]
        selected = self.get_component_styles("tint--selected").color
        ink = self.get_component_styles("tint--hottest").color
        disk = self.get_component_styles("tint--disk").color
        memory = self.get_component_styles("tint--memory").color
        steps = [level / (LEVELS - 1) for level in range(LEVELS)]
        # Even an idle expert in memory stands out from the ground; the hottest ones glow.
        ramp = [ground.blend(disk, min(1, 0.08 + 1.1 * step)) for step in steps]
        for step in steps:
            tint = ground.blend(memory, min(1, 0.2 + 1.1 * step))
            ramp.append(tint.blend(ink, 2 * max(0, step - 0.7)))
        return (*ramp, ground, selected)

    @cached_property
    def plain(self) -> Style:
        """The widget's own style, which Textual works out anew each time."""
        return self.rich_style

    @cached_property
    def styles_by_code(self) -> dict[int, Style]:
        """Styles of single codes (shaded), or of pairs of them, upper * _CODES + lower."""
        return {}

    def style_of(self, code: int) -> Style:
        """The style of a code where shades are drawn, or of a pair of codes where halves are."""
        style = self.styles_by_code.get(code)
        if style is None:
            style = self._shade_style(code) if self.shaded else self._half_style(code)
            self.styles_by_code[code] = style
        return style

    def _half_style(self, pair: int) -> Style:
        upper, lower = divmod(pair, _CODES)
        return Style(color=self.tints[upper].rich_color, bgcolor=self.tints[lower].rich_color)

    def _shade_style(self, code: int) -> Style:
        if code == SELECTED:
            return self.plain + Style(reverse=True, bold=True)
        if code == NOTHING:
            return self.plain
        return self.get_component_rich_style("tint--disk" if code < LEVELS else "tint--memory")

    def notify_style_update(self) -> None:
        """Forget the colours of another theme."""
        super().notify_style_update()
        for name in ("tints", "plain", "styles_by_code"):
            self.__dict__.pop(name, None)


def shade(code: int) -> str:
    """The character of a code where colours cannot tell."""
    if code >= NOTHING:
        return " " if code == NOTHING else "█"
    shades = MEMORY_SHADES if code >= LEVELS else DISK_SHADES
    return shades[code % LEVELS * len(shades) // LEVELS]


class HeatMap(Tinted, can_focus=True):
    """Layers from top to bottom, experts from left to right.

    With colours two layers share a line; with few colours each has its own line, or, where there
    are very many layers, the hotter one of two is shown. Arrow keys or the mouse point at a cell.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1, 0)", "Layer above", show=False),
        Binding("down", "move(1, 0)", "Layer below", show=False),
        Binding("left", "move(0, -1)", "Expert before", show=False),
        Binding("right", "move(0, 1)", "Expert after", show=False),
    ]

    DEFAULT_CSS = """
    HeatMap {
        width: 1fr;
        height: auto;
    }
    """

    class Pointed(Message):
        """A cell was pointed at: `place` and `facts` in words, both empty when none is."""

        def __init__(self, place: str, facts: str) -> None:
            super().__init__()
            self.place = place
            self.facts = facts

    class Moved(Message):
        """The keyboard's cursor went to line `y` of the map."""

        def __init__(self, y: int) -> None:
            super().__init__()
            self.y = y

    def __init__(self) -> None:
        super().__init__()
        self._activity: ExpertActivity | None = None
        self._heat = Heat()
        self._shares: NDArray[np.float64] = np.zeros((0, 0))
        self._grid = Grid(0, 0, 0, 1)
        self._codes: NDArray[np.uint16] = np.zeros((0, 0), np.uint16)
        self._lines: NDArray[np.uint16] = np.zeros((0, 0), np.uint16)
        self._strips: dict[int, Strip] = {}
        self._cursor: tuple[int, int] | None = None
        self._words = ("", "")
        self._was_shaded = False
        self.display = False

    @property
    def shares(self) -> NDArray[np.float64]:
        """Parts of their layer's uses of late, float64 [layers, experts]."""
        return self._shares

    def show(self, activity: ExpertActivity | None) -> None:
        """Take in a new reading; None for a model without routed experts."""
        if activity is None:
            self._activity = None
            self.display = False
            self._point(None)
            return
        before = self._activity
        self._activity = activity
        self._heat.update(activity.uses)
        self._shares = self._heat.shares()
        self.display = True
        shape = (activity.layers, activity.uses.shape)
        if before is None or (before.layers, before.uses.shape) != shape:
            self._cursor = None
            self.refresh(layout=True)
        self._draw()
        self._say()

    # What is drawn

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        """A line for each `_layers_a_line` layers."""
        if self._activity is None:
            return 0
        return -(-len(self._activity.layers) // self._layers_a_line)

    @property
    def _layers_a_line(self) -> int:
        layers = 0 if self._activity is None else len(self._activity.layers)
        return 1 if self.shaded and layers <= _MOST_SHADED_ROWS else 2

    def _draw(self) -> None:
        """Work out all lines, and ask for those that changed to be drawn again."""
        if self._activity is None or self.size.width == 0:
            return
        layers, resident = self._activity.layers, self._activity.resident
        grid = Grid.of(layers, resident.shape[1], self.size.width)
        self._codes = grid.codes(self._shares, resident)
        lines = self._joined(self._codes)
        if grid != self._grid or lines.shape != self._lines.shape:
            self._strips.clear()
            self.refresh()
        else:
            changed = np.flatnonzero((lines != self._lines).any(axis=1)).tolist()
            for y in changed:
                self._strips.pop(y, None)
            if changed:
                self.refresh(*(Region(0, y, self.size.width, 1) for y in changed))
        self._grid, self._lines = grid, lines

    def _joined(self, codes: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Codes [layers, columns] as what stands in the cells of each line."""
        if self._layers_a_line == 1:
            joined = codes.copy()
            if self._cursor is not None:
                joined[self._cursor] = SELECTED
            return joined
        codes = np.pad(codes, ((0, len(codes) % 2), (0, 0)), constant_values=NOTHING)
        if self._cursor is not None:
            codes[self._cursor] = SELECTED
        upper, lower = codes[0::2], codes[1::2]
        if not self.shaded:
            return upper * _CODES + lower
        hotter = (lower % LEVELS > upper % LEVELS) | (lower == SELECTED)
        return np.where(hotter & (upper != SELECTED) & (lower != NOTHING), lower, upper)

    def render_line(self, y: int) -> Strip:
        """One line of the map."""
        if y >= len(self._lines) or self._activity is None:
            return Strip.blank(self.size.width, self.plain)
        if y not in self._strips:
            layer = self._activity.layers[y * self._layers_a_line]
            width = max(self.size.width, self._grid.width)
            self._strips[y] = Strip(self._segments(y, layer), width).crop(0, self.size.width)
        return self._strips[y]

    def _segments(self, y: int, layer: int) -> Iterator[Segment]:
        grid, shaded, style_of = self._grid, self.shaded, self.style_of
        here = self._cursor is not None and self._cursor[0] // self._layers_a_line == y
        label = str(layer) if y % _LABEL_EVERY == 0 else ""
        text = self.get_component_rich_style("tint--text")
        yield Segment(label.rjust(grid.label - 1), text)
        yield Segment("▸" if here else " ", self.get_component_rich_style("tint--selected"))
        for code, run in groupby(self._lines[y].tolist()):
            cells = len(list(run)) * grid.stretch
            yield Segment((shade(code) if shaded else "▀") * cells, style_of(code))
        yield Segment(" " * (self.size.width - grid.width), self.plain)

    def on_resize(self) -> None:
        """Lay the experts out anew."""
        self._draw()

    def notify_style_update(self) -> None:
        """Draw in the new theme."""
        super().notify_style_update()
        self._strips.clear()
        if self.is_attached and self.shaded != self._was_shaded:
            self._was_shaded = self.shaded
            self.refresh(layout=True)
            self._draw()

    # What is pointed at

    def action_move(self, down: int, right: int) -> None:
        """Move the cursor; at the edge the keys are left to what scrolls."""
        if self._activity is None or not self._codes.size:
            raise SkipAction
        y, x = self._cursor or (0, 0)
        if self._cursor is not None:
            y, x = y + down, x + right
        if not (0 <= y < self._codes.shape[0] and 0 <= x < self._codes.shape[1]):
            raise SkipAction
        self._point((y, x))
        self.post_message(self.Moved(y // self._layers_a_line))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Point at the cell under the mouse; at the hotter one of two."""
        x = (event.x - self._grid.label) // self._grid.stretch
        first = event.y * self._layers_a_line
        layers = self._codes[first : first + self._layers_a_line]
        if not layers.size or not 0 <= x < self._grid.columns:
            self._point(None)
            return
        self._point((first + int((layers[:, x] % LEVELS).argmax()), x))

    def on_leave(self) -> None:
        """Point at nothing once the mouse is gone."""
        self._point(None)

    def on_blur(self) -> None:
        """Point at nothing once the keyboard is elsewhere."""
        self._point(None)

    def _point(self, cursor: tuple[int, int] | None) -> None:
        if cursor != self._cursor:
            self._cursor = cursor
            self._draw()
        self._say()

    def _say(self) -> None:
        """Tell what is pointed at, where that changed."""
        words = ("", "")
        if self._activity is not None and self._cursor is not None:
            words = self._describe(self._activity, *self._cursor)
        if words != self._words:
            self._words = words
            self.post_message(self.Pointed(*words))

    def _describe(self, activity: ExpertActivity, row: int, column: int) -> tuple[str, str]:
        """The place of a cell and its facts: "layer 12, expert 33", "1.8% of uses, in memory"."""
        first, end = self._grid.first(column), self._grid.first(column + 1)
        resident = activity.resident[row, first:end]
        share = self._shares[row, first:end].sum()
        count = len(resident)
        if count == 1:
            experts = f"expert {first}"
            where = activity.near if resident[0] else activity.far
        else:
            experts = f"experts {first}-{end - 1}"
            where = f"{resident.sum()} of {count} {activity.near}"
        return f"layer {activity.layers[row]}, {experts}", f"{share:.1%} of uses, {where}"


class Legend(Tinted):
    """Two lines below the map: what its tints mean, or what is pointed at."""

    DEFAULT_CSS = """
    Legend {
        width: 1fr;
        height: 2;
        color: $foreground;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._words = ("", "")
        self._places = ("in memory", "on disk")

    def tell_places(self, near: str, far: str) -> None:
        """Say where experts lie that are near, and the others."""
        if self._places != (near, far):
            self._places = near, far
            self.refresh()

    def show(self, place: str, facts: str) -> None:
        """Show these words; the meaning of the tints where they are empty."""
        self._words = (place, facts)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """One of the two lines."""
        said = [Segment(self._words[y], self.plain)] if any(self._words) else self._explained(y)
        return Strip(said).adjust_cell_length(self.size.width, self.plain)

    def _explained(self, y: int) -> list[Segment]:
        text = self.get_component_rich_style("tint--text")
        width = max(map(len, self._places)) + 1
        name, note, first = (
            self._places[y].ljust(width),
            *(("  idle to busy", LEVELS) if y == 0 else ("", 0)),
        )
        codes = range(first, first + LEVELS)
        if self.shaded:
            steps = [Segment(shade(code), self.style_of(code)) for code in codes]
        else:
            steps = [Segment("▀", self.style_of(code * _CODES + code)) for code in codes]
        return [Segment(name, text), *steps, Segment(note, text)]

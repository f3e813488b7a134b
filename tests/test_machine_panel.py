"""The panel of the chat app that shows what the machine does."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from textual.app import App, ComposeResult
from textual.containers import Vertical
from textual.strip import Strip

from localds.monitor import ExpertActivity, Figures, Reading, Tier
from tui.widgets.heat import BRIGHTEST, GAMMA, HALF_LIFE, LEVELS, NOTHING, SELECTED, Grid, Heat
from tui.widgets.heat_map import HeatMap, Legend
from tui.widgets.machine import CacheFigures, MachinePanel, Progress
from tui.widgets.meters import Fact, Heading, Meter, Row, Rows, Trend, bar, sparkline

GIB = 1024**3
TIERS = (
    Tier("RAM: weights", GIB, GIB),
    Tier("RAM: latent cache", 96 * 1024**2, 384 * 1024**2),
    Tier("process", 3 * GIB, 8 * GIB),
)
PROGRESS = Progress("answering", 512, 2048, 128, 1.84, 212, 14.24, 311.6, 3021, 8192)


def in_an_app(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture(autouse=True)
def _true_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class PanelApp(App[None]):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.clock = Clock()
        self.panel = MachinePanel(clock=self.clock)
        self.panel.styles.width = width

    def compose(self) -> ComposeResult:
        with Vertical():
            yield self.panel


class MapApp(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.map = HeatMap()
        self.said: list[tuple[str, str]] = []

    def compose(self) -> ComposeResult:
        yield self.map

    def on_heat_map_pointed(self, event: HeatMap.Pointed) -> None:
        self.said.append((event.place, event.facts))


def screen_text(app: App[None]) -> str:
    strips = app.screen._compositor.render_strips()
    return "\n".join(strip.text.rstrip() for strip in strips)


def value(app: App[None], name: str) -> str:
    """What stands at the right of a row, after its bar."""
    match = re.search(rf"^ *{re.escape(name)}  *(.*)$", screen_text(app), re.MULTILINE)
    assert match, f"{name!r} is not shown in\n{screen_text(app)}"
    return re.sub(r"^[━╸─▁-█ ]*", "", match[1]).strip()


def activity(
    layers: int, experts: int, seed: int = 0, scale: int = 100, first: int = 1
) -> ExpertActivity:
    rng = np.random.default_rng(seed)
    uses = (rng.gamma(0.4, size=(layers, experts)) * scale).astype(np.uint64)
    resident = rng.random((layers, experts)) < 0.4
    return ExpertActivity(tuple(range(first, first + layers)), uses, resident)


def reading(experts: ExpertActivity | None, figures: Figures | None = None) -> Reading:
    return Reading(experts, TIERS, figures or Figures(90, 10, 5 * GIB, 3.2))


# Bars and sparklines


@pytest.mark.parametrize("width", [1, 2, 7, 30])
def test_a_bar_is_as_long_as_its_share(width: int) -> None:
    for thousandths in range(-100, 1300, 7):
        share = thousandths / 1000
        filled, rest = bar(share, width)
        assert len(filled) + len(rest) == width
        halves = 2 * filled.count("━") + filled.count("╸")
        assert abs(halves - min(max(share, 0), 1) * 2 * width) <= 1
        assert (halves == 0) == (share <= 0)
        assert (halves == 2 * width) == (share >= 1)


def test_a_sparkline_shows_the_means_of_a_minute() -> None:
    samples = [(second, 8.0 if second < 30 else 4.0) for second in range(60)]
    assert sparkline(samples, 59, 60) == "█" * 30 + "▅" * 30
    assert sparkline(samples, 59, 13) == "█" * 6 + "▅" * 6
    assert sparkline(samples, 89, 60) == "█" * 30 + " " * 30
    assert sparkline([], 59, 10) == " " * 10
    assert sparkline([(59, 0.0)], 59, 4) == "   ▁"


def test_columns_of_a_sparkline_keep_their_values_as_they_move() -> None:
    rng = np.random.default_rng(3)
    samples = [(second, float(rng.random())) for second in range(200)]
    shown = [sparkline(samples, now, 12).rstrip() for now in (199, 200, 201, 204)]
    # Columns of 5 seconds: 195 to 199 is the last one, whatever part of the next has gone by.
    assert [line[-1] for line in shown] == [shown[0][-1]] * 4


@in_an_app
async def test_rows_draw_only_what_changed() -> None:
    class RowsApp(App[None]):
        def compose(self) -> ComposeResult:
            yield rows

    rows = Rows()
    drawn: list[int] = []
    plain = rows.render_line

    def counted(y: int) -> Strip:
        drawn.append(y)
        return plain(y)

    rows.render_line = counted  # type: ignore[method-assign]
    before: list[Row] = [
        Heading("A"),
        Meter("m", 0.5, "50%"),
        Fact("f", "1"),
        Trend("t", ((1, 2.0),), 1, "2"),
    ]
    async with RowsApp().run_test(size=(40, 10)) as pilot:
        rows.show(before)
        await pilot.pause()
        drawn.clear()
        rows.show([*before[:2], Fact("f", "2"), before[3]])
        await pilot.pause()
        assert drawn == [2]
        rows.show([*before[:2], Fact("f", "2"), before[3]])
        await pilot.pause()
        assert drawn == [2]


@in_an_app
async def test_more_than_all_is_marked_by_a_sign() -> None:
    async with PanelApp(60).run_test(size=(60, 40)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        app.panel.show(PROGRESS, Reading(None, (Tier("process", 9 * GIB, 8 * GIB),), Figures()))
        await pilot.pause()
        assert value(app, "process") == "! 9 / 8 GiB"


# Heat


def test_heat_follows_its_closed_form() -> None:
    """Uses at a steady mix weigh 2^-(later uses / half life), integrated over each update."""
    rng = np.random.default_rng(1)
    experts = 6
    half_life = HALF_LIFE * experts
    heat, totals = Heat(), np.zeros((1, experts), np.uint64)
    steps = [rng.integers(0, 9, experts) for _ in range(12)]
    for step in steps:
        totals = totals + step.astype(np.uint64)
        heat.update(totals)
    expected = np.zeros(experts)
    for number, step in enumerate(steps):
        later = sum(int(other.sum()) for other in steps[number + 1 :])
        n = int(step.sum())
        whole = (1 - 2 ** (-n / half_life)) * half_life / math.log(2) if n else 0.0
        expected += step / max(n, 1) * whole * 2 ** (-later / half_life)
    np.testing.assert_allclose(heat.shares()[0], expected / expected.sum(), rtol=1e-12)


def test_heat_does_not_depend_on_how_often_one_looks() -> None:
    step = np.array([[1, 2, 0, 5], [3, 0, 0, 1]], np.uint64)
    often, seldom = Heat(), Heat()
    start = np.array([[40, 0, 3, 0], [0, 9, 0, 9]], np.uint64)
    for heat in (often, seldom):
        heat.update(start)
    for times in range(1, 9):
        often.update(start + np.uint64(times) * step)
    seldom.update(start + np.uint64(8) * step)
    np.testing.assert_allclose(often.shares(), seldom.shares(), rtol=1e-12)


def test_after_a_half_life_old_uses_weigh_half_of_what_they_did() -> None:
    experts = 2
    heat = Heat()
    heat.update(np.array([[10**9, 0]], np.uint64))
    heat.update(np.array([[10**9, HALF_LIFE * experts]], np.uint64))
    np.testing.assert_allclose(heat.shares(), [[0.5, 0.5]], rtol=1e-6)


def test_layers_without_uses_have_no_heat_and_lower_totals_begin_anew() -> None:
    heat = Heat()
    heat.update(np.array([[0, 0], [3, 1]], np.uint64))
    np.testing.assert_allclose(heat.shares(), np.array([[0, 0], [0.75, 0.25]]), rtol=1e-12)
    heat.update(np.array([[0, 4], [0, 1]], np.uint64))
    assert heat.shares().tolist() == [[0, 1], [0, 1]]
    heat.update(np.array([[5]], np.uint64))
    assert heat.shares().tolist() == [[1]]


def code_of(shares: list[float], resident: list[bool], experts: int) -> int:
    """The hottest of some experts by level; of equals, one in memory."""
    best = -1, False
    for share, here in zip(shares, resident, strict=True):
        level = min(int((share * experts / BRIGHTEST) ** GAMMA * LEVELS), LEVELS - 1)
        best = max(best, (level, here))
    return best[0] + LEVELS * best[1]


def expected_codes(
    shares: NDArray[np.float64], resident: NDArray[np.bool_], grid: Grid
) -> list[list[int]]:
    layers, experts = shares.shape
    codes: list[list[int]] = []
    for layer in range(layers):
        row = []
        for column in range(grid.columns):
            part = slice(grid.first(column), grid.first(column + 1))
            row.append(
                code_of(shares[layer, part].tolist(), resident[layer, part].tolist(), experts)
            )
        codes.append(row)
    return codes


@pytest.mark.parametrize(
    ("layers", "experts"), [(1, 1), (2, 2), (26, 64), (5, 160), (61, 256), (3, 7)]
)
@pytest.mark.parametrize("width", [4, 31, 32, 57, 200, 300])
def test_cells_agree_with_a_plain_loop(layers: int, experts: int, width: int) -> None:
    seen = activity(layers, experts, seed=width)
    heat = Heat()
    heat.update(seen.uses)
    grid = Grid.of(seen.layers, experts, width)
    assert grid.codes(heat.shares(), seen.resident).tolist() == expected_codes(
        heat.shares(), seen.resident, grid
    )


@pytest.mark.parametrize("experts", [1, 2, 8, 64, 160, 256])
def test_a_grid_fits_and_has_each_expert_once(experts: int) -> None:
    for width in range(4, 301):
        grid = Grid.of((1, 58), experts, width)
        assert grid.width <= width
        assert grid.stretch >= 1
        bounds = [grid.first(column) for column in range(grid.columns + 1)]
        sizes = {end - first for first, end in pairwise(bounds)}
        assert bounds[0] == 0 and bounds[-1] == experts
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


# The map on the screen


def cells(strip: Strip) -> list[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]]:
    found = []
    for text, style, _ in strip:
        ink = tuple(style.color.get_truecolor()) if style and style.color else None
        ground = tuple(style.bgcolor.get_truecolor()) if style and style.bgcolor else None
        found += [(character, ink, ground) for character in text]
    return found


@pytest.mark.parametrize(("layers", "experts"), [(26, 64), (61, 256), (3, 2), (1, 1)])
@in_an_app
async def test_halves_have_the_colours_of_their_cells(layers: int, experts: int) -> None:
    async with MapApp().run_test(size=(57, 40)) as pilot:
        shown = pilot.app.query_one(HeatMap)
        seen = activity(layers, experts)
        shown.show(seen)
        await pilot.pause()
        assert shown.size.height == -(-layers // 2)
        grid = Grid.of(seen.layers, experts, 57)
        codes = expected_codes(shown.shares, seen.resident, grid)
        codes.append([NOTHING] * grid.columns)
        for y in range(shown.size.height):
            line = cells(shown.render_line(y))
            assert len(line) == 57
            for column in range(grid.columns):
                x = grid.label + column * grid.stretch
                wanted = tuple(
                    tuple(shown.tints[codes[row][column]].rgb) for row in (2 * y, 2 * y + 1)
                )
                for character, ink, ground in line[x : x + grid.stretch]:
                    assert (character, ink, ground) == ("▀", *wanted)


@pytest.mark.parametrize("reason", ["NO_COLOR", "TERM", "theme"])
@in_an_app
async def test_with_few_colours_characters_tell(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    if reason == "TERM":
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("COLORTERM")
    async with MapApp().run_test(size=(57, 40)) as pilot:
        if reason == "theme":
            pilot.app.theme = "ansi-dark"
        shown = pilot.app.query_one(HeatMap)
        seen = activity(20, 32)
        shown.show(seen)
        await pilot.pause()
        grid = Grid.of(seen.layers, 32, 57)
        codes = expected_codes(shown.shares, seen.resident, grid)
        assert shown.size.height == 20
        for y, row in enumerate(codes):
            text = shown.render_line(y).text[grid.label : grid.label + 32]
            wanted = ["·:+#░▒▓█"[code // LEVELS * 4 + code % LEVELS // 2] for code in row]
            assert text == "".join(wanted)


@in_an_app
async def test_with_few_colours_the_hotter_of_two_layers_is_shown() -> None:
    async with MapApp().run_test(size=(57, 40)) as pilot:
        shown = pilot.app.query_one(HeatMap)
        seen = activity(61, 40)
        shown.show(seen)
        await pilot.pause()
        assert shown.size.height == 31
        pilot.app.theme = "ansi-light"
        await pilot.pause()
        assert shown.size.height == 31
        grid = Grid.of(seen.layers, 40, 57)
        codes = expected_codes(shown.shares, seen.resident, grid)
        for y in range(30):
            text = shown.render_line(y).text[grid.label : grid.label + 40]
            for x, character in enumerate(text):
                upper, lower = codes[2 * y][x], codes[2 * y + 1][x]
                code = lower if lower % LEVELS > upper % LEVELS else upper
                assert character == "·:+#░▒▓█"[code // LEVELS * 4 + code % LEVELS // 2]


@in_an_app
async def test_a_change_of_theme_changes_lines_and_colours() -> None:
    async with MapApp().run_test(size=(57, 40)) as pilot:
        shown = pilot.app.query_one(HeatMap)
        shown.show(activity(26, 64))
        await pilot.pause()
        looks = set()
        for theme, lines in [("nord", 13), ("ansi-dark", 26), ("textual-light", 13)]:
            pilot.app.theme = theme
            await pilot.pause()
            assert shown.size.height == lines
            looks.add(str(cells(shown.render_line(0))))
        assert len(looks) == 3


def count_drawn(shown: HeatMap) -> list[int]:
    drawn: list[int] = []
    plain = shown.render_line

    def counted(y: int) -> Strip:
        drawn.append(y)
        return plain(y)

    shown.render_line = counted  # type: ignore[method-assign]
    return drawn


@in_an_app
async def test_only_lines_that_changed_are_drawn_again() -> None:
    async with MapApp().run_test(size=(57, 40)) as pilot:
        shown = pilot.app.query_one(HeatMap)
        drawn = count_drawn(shown)
        seen = activity(61, 256)
        shown.show(seen)
        await pilot.pause()
        drawn.clear()
        shown.show(replace(seen))
        await pilot.pause()
        assert drawn == []
        # The experts of column 0 in layers 8 and 9, which share a line, and in layer 40.
        resident = seen.resident.copy()
        for layer in (8, 9, 40):
            resident[layer, :4] ^= True
        before = [shown.render_line(y).text + str(cells(shown.render_line(y))) for y in range(31)]
        drawn.clear()
        shown.show(replace(seen, resident=resident))
        await pilot.pause()
        assert sorted(drawn) == [4, 20]
        after = [shown.render_line(y).text + str(cells(shown.render_line(y))) for y in range(31)]
        assert [y for y in range(31) if before[y] != after[y]] == [4, 20]
        for seed in range(1, 5):
            before = [str(cells(shown.render_line(y))) for y in range(31)]
            drawn.clear()
            some = activity(61, 256, seed, scale=1).uses
            some[:: seed + 1] = 0
            seen = replace(seen, uses=seen.uses + some)
            shown.show(seen)
            await pilot.pause()
            fresh = list(drawn)
            after = [str(cells(shown.render_line(y))) for y in range(31)]
            changed = [y for y in range(31) if before[y] != after[y]]
            assert sorted(fresh) == changed


@in_an_app
async def test_what_an_update_costs() -> None:
    async with MapApp().run_test(size=(57, 40)) as pilot:
        shown = pilot.app.query_one(HeatMap)
        seen = activity(61, 256)
        costs = []
        for seed in range(20):
            seen = replace(seen, uses=seen.uses + activity(61, 256, seed, scale=3).uses)
            begin = time.perf_counter()
            shown.show(seen)
            updated = time.perf_counter()
            for y in range(shown.size.height):
                shown.render_line(y)
            costs.append((updated - begin, time.perf_counter() - updated))
            await pilot.pause()
        update, draw = (sorted(cost)[len(cost) // 2] * 1e3 for cost in zip(*costs, strict=True))
        print(f"61 x 256: {update:.2f} ms to take in, {draw:.2f} ms to draw (medians)")
        assert len(costs) == 20


@in_an_app
async def test_keys_and_mouse_point_at_cells() -> None:
    async with PanelApp(60).run_test(size=(60, 60)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        uses = np.zeros((4, 3), np.uint64)
        uses[1] = [10, 70, 20]
        uses[3] = [1, 1, 2]
        resident = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [1, 0, 0]], np.bool_)
        app.panel.show(PROGRESS, reading(ExpertActivity((11, 12, 13, 20), uses, resident)))
        await pilot.pause()
        assert "idle to busy" in screen_text(app)
        shown = app.query_one(HeatMap)
        shown.focus()
        await pilot.press("down", "down", "right")
        assert "layer 12, expert 1\n" in screen_text(app)
        assert "70.0% of uses, in memory" in screen_text(app)
        await pilot.press("right")
        assert "20.0% of uses, on disk" in screen_text(app)
        # The upper half of the second cell's line is that of layer 11, so the lower one is marked.
        stretch = Grid.of((20,), 3, shown.size.width).stretch
        marked = cells(shown.render_line(0))[3 + 2 * stretch]
        assert marked[2] == tuple(shown.tints[SELECTED].rgb)
        await pilot.press("down", "down", "down", "down", "right", "right")
        assert "layer 20, expert 2\n" in screen_text(app)
        await pilot.hover(HeatMap, offset=(3 + stretch, 1))
        assert "layer 20, expert 1\n" in screen_text(app)
        assert "25.0% of uses, on disk" in screen_text(app)
        await pilot.hover(Legend)
        assert "idle to busy" in screen_text(app)


@in_an_app
async def test_groups_are_described_by_their_sums() -> None:
    async with MapApp().run_test(size=(34, 20)) as pilot:
        app = pilot.app
        assert isinstance(app, MapApp)
        shown = app.map
        shown.focus()
        uses = np.zeros((1, 64), np.uint64)
        uses[0, :4] = [1, 3, 2, 4]
        resident = np.zeros((1, 64), np.bool_)
        resident[0, 3] = True
        shown.show(ExpertActivity((5,), uses, resident))
        await pilot.pause()
        await pilot.press("right", "right")
        assert app.said == [
            ("layer 5, experts 0-1", "40.0% of uses, 0 of 2 in memory"),
            ("layer 5, experts 2-3", "60.0% of uses, 1 of 2 in memory"),
        ]
        # A smaller model takes the place of what was pointed at.
        shown.show(ExpertActivity((5,), uses[:, :1], resident[:, :1]))
        await pilot.pause()
        assert app.said[2:] == [("", "")]


# The panel


@in_an_app
async def test_the_numbers_are_those_given() -> None:
    async with PanelApp(60).run_test(size=(200, 60)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        seen = activity(26, 64)
        app.panel.show(PROGRESS, reading(seen))
        await pilot.pause()
        assert value(app, "Reply") == "answering"
        assert value(app, "speed") == "14.2 tokens/s"
        assert value(app, "prompt") == "512 / 2,048"
        assert value(app, "context") == "3,021 / 8,192"
        assert value(app, "prompt from cache") == "128 tokens"
        assert value(app, "first token after") == "1.84 s"
        assert value(app, "prompt speed") == "312 tokens/s"
        assert value(app, "reply") == "212 tokens"
        assert value(app, "weights") == "1 GiB"
        assert value(app, "latent cache") == "96 / 384 MiB"
        assert value(app, "process") == "3 / 8 GiB"
        assert value(app, "Experts") == f"{int(seen.resident.sum()):,} of 1,664 in memory"
        assert value(app, "hits now") == "90.0%"
        assert value(app, "hits in chat") == "90.0%"
        assert value(app, "read from disk now") == "-"
        assert value(app, "read from disk in chat") == "5 GiB"
        assert value(app, "waited for the disk") == "3.20 s"


@in_an_app
async def test_nothing_yet_is_shown_as_such() -> None:
    async with PanelApp(40).run_test(size=(80, 40)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        app.panel.show(Progress(), None)
        await pilot.pause()
        for name in ("speed", "prompt", "context", "first token after", "prompt speed"):
            assert value(app, name) == "-"
        assert value(app, "Reply") == "idle"
        assert "Experts" not in screen_text(app)
        assert "Memory" not in screen_text(app)
        assert "idle to busy" not in screen_text(app)


@in_an_app
async def test_rates_come_from_successive_readings() -> None:
    async with PanelApp(60).run_test(size=(80, 60)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        seen = activity(4, 8)

        async def show(figures: Figures, after: float) -> tuple[str, ...]:
            app.clock.now += after
            app.panel.show(PROGRESS, reading(seen, figures))
            await pilot.pause()
            names = ("hits now", "hits in chat", "read from disk now", "read from disk in chat")
            return tuple(value(app, name) for name in names)

        mib = 1024**2
        first = Figures(60, 40, 100 * mib, 1.0)
        assert await show(first, 0) == ("60.0%", "60.0%", "-", "100 MiB")
        # 30 of 40, 90 of 140, 50 MiB in half a second.
        second = Figures(90, 50, 150 * mib, 1.5)
        assert await show(second, 0.5) == ("75.0%", "64.3%", "100 MiB/s", "150 MiB")
        assert await show(second, 0.5) == ("-", "64.3%", "0 B/s", "150 MiB")
        app.panel.start_chat()
        # 1 of 4, both now and in the chat.
        third = Figures(91, 53, 170 * mib, 1.75)
        assert await show(third, 4) == ("25.0%", "25.0%", "5 MiB/s", "20 MiB")
        assert value(app, "waited for the disk") == "0.25 s"
        # Another model: its counters are lower.
        assert await show(Figures(3, 1, 8 * mib, 0.0), 1) == ("75.0%", "75.0%", "-", "8 MiB")


@in_an_app
async def test_the_speed_of_the_last_minute_is_drawn() -> None:
    async with PanelApp(60).run_test(size=(80, 60)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        for quarter in range(240):
            app.clock.now = 1020 + quarter / 4
            speed = 8.0 if quarter < 120 else 4.0
            app.panel.show(replace(PROGRESS, tokens_per_second=speed), None)
        app.clock.now = 1079.5
        app.panel.show(replace(PROGRESS, state="idle", tokens_per_second=4.0), None)
        await pilot.pause()
        row = next(line for line in screen_text(app).split("\n") if "speed" in line)
        # 27 columns are free; 20 of 3 seconds are the most that a minute divides into.
        assert re.fullmatch(r" speed +█{10}▅{10} +4.00 tokens/s", row)


def test_rates_are_those_between_two_updates() -> None:
    figures = CacheFigures()
    figures.update(Figures(1, 1, 0, 0.0), 1.0)
    again = figures.update(Figures(2, 1, 1000, 0.0), 3.0)
    assert (again.hit_rate_now, again.hit_rate_chat) == (1.0, 2 / 3)
    assert again.read_bytes_per_second == 500


@in_an_app
async def test_showing_a_reading_again_leaves_the_rates() -> None:
    async with PanelApp(60).run_test(size=(80, 60)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        given = reading(activity(4, 8))
        for _ in range(3):
            app.clock.now += 1
            app.panel.show(PROGRESS, given)
            await pilot.pause()
            assert value(app, "hits now") == "90.0%"


@in_an_app
async def test_models_without_a_store_say_so() -> None:
    async with PanelApp(60).run_test(size=(80, 60)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        seen = activity(4, 8)
        whole = replace(seen, resident=np.ones((4, 8), np.bool_))
        app.panel.show(PROGRESS, reading(whole, Figures()))
        await pilot.pause()
        assert value(app, "Experts") == "all experts in memory"
        assert "hits" not in screen_text(app)
        assert app.query_one(HeatMap).size.height == 2
        app.panel.show(PROGRESS, reading(None, Figures()))
        await pilot.pause()
        assert value(app, "Experts") == "none in this model"
        assert not app.query_one(HeatMap).display
        assert "idle to busy" not in screen_text(app)


EDGES = [
    None,
    ExpertActivity((3,), np.array([[7]], np.uint64), np.array([[True]])),
    ExpertActivity((1, 2), np.zeros((2, 64), np.uint64), np.zeros((2, 64), np.bool_)),
    activity(61, 256, first=3),
    activity(26, 64),
]


@pytest.mark.parametrize("theme", ["textual-dark", "ansi-dark"])
@in_an_app
async def test_all_models_fit_in_all_sizes(theme: str) -> None:
    """Models follow one another in one panel, whose size changes under them."""
    async with PanelApp(34).run_test(size=(80, 24)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        app.theme = theme
        for columns, lines, width in [(80, 24, 34), (80, 24, 46), (200, 60, 60), (40, 12, 20)]:
            await pilot.resize_terminal(columns, lines)
            app.panel.styles.width = width
            for edge in EDGES:
                app.panel.show(PROGRESS, reading(edge))
                await pilot.pause()
                await pilot.pause()
                text = screen_text(app)
                assert value(app, "Reply") == "answering"
                assert all(len(line) <= width for line in text.split("\n"))
                assert ("on disk" in text) == (edge is not None)
                if width >= 34:
                    assert value(app, "speed") == "14.2 tokens/s"
                    assert value(app, "context") in ("3,021 / 8,192", "37%")
                assert not app.panel._scroll.show_horizontal_scrollbar


@in_an_app
async def test_the_panel_scrolls_by_keys_and_follows_the_cursor() -> None:
    async with PanelApp(40).run_test(size=(80, 24)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        app.panel.show(PROGRESS, reading(activity(60, 64)))
        await pilot.pause()
        assert "Reply" in screen_text(app)
        await pilot.press("tab", "end")
        await pilot.pause(0.5)
        assert "Reply" not in screen_text(app)
        assert re.search(r"^ *57 ", screen_text(app), re.MULTILINE)
        app.query_one(HeatMap).focus()
        await pilot.press("down")
        await pilot.pause()
        assert re.search(r"^ *1▸", screen_text(app), re.MULTILINE)
        await pilot.press(*["down"] * 59)
        await pilot.pause()
        assert "layer 60, expert" in screen_text(app)
        assert re.search(r"^ *▸▀", screen_text(app), re.MULTILINE)


class Untouchable:
    """Stands for a reading that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read while hidden")


@in_an_app
async def test_hidden_panels_do_nothing() -> None:
    async with PanelApp(60).run_test(size=(80, 60)) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        await pilot.pause()
        untouchable: Any = Untouchable()
        app.panel.display = False
        app.panel.show(untouchable, untouchable)
        await pilot.pause()
        app.panel.show(untouchable, untouchable)
        app.panel.show(PROGRESS, reading(activity(4, 8)))
        app.panel.display = True
        await pilot.pause()
        assert value(app, "speed") == "14.2 tokens/s"
        assert value(app, "hits now") == "90.0%"
        around = app.query_one(Vertical)
        around.display = False
        await pilot.pause()
        app.panel.show(untouchable, untouchable)
        await pilot.pause()
        app.panel.show(replace(PROGRESS, generated=7), None)
        around.display = True
        await pilot.pause()
        assert value(app, "reply") == "7 tokens"
    MachinePanel().show(untouchable, untouchable)

"""The panel that shows, while a reply is made, what the machine does for it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from textual.containers import VerticalScroll
from textual.geometry import Region
from textual.widget import Widget

from localds.monitor import Figures
from localds.units import format_size
from tui.widgets.heat_map import HeatMap, Legend
from tui.widgets.meters import MINUTE, Fact, Heading, Meter, Row, Rows, Trend

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult

    from localds.monitor import ExpertActivity, Reading, Tier

COMPACT_BELOW = 30
"""Lines of a panel below which it leaves out what matters least."""

LEGEND_LINES = 2

NONE = "-"
_STATES = {
    "idle": "idle",
    "loading": "loading the model",
    "reading": "reading the prompt",
    "answering": "answering",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """The running reply, or the last one. Times in seconds; all counts and sizes in tokens.

    `prompt_done` of `prompt_total` tokens are in the cache, the `reused` ones from earlier.
    """

    state: Literal["idle", "loading", "reading", "answering"] = "idle"
    prompt_done: int = 0
    prompt_total: int = 0
    reused: int = 0
    first_token_seconds: float | None = None
    generated: int = 0
    tokens_per_second: float = 0.0
    prefill_per_second: float = 0.0
    context_used: int = 0
    context_size: int = 0


@dataclass(frozen=True, slots=True)
class Cache:
    """What the store of experts did. Rates are None where there was no use to tell them from."""

    hit_rate_now: float | None
    hit_rate_chat: float | None
    read_bytes_per_second: float | None
    read_bytes: int
    stall_seconds: float


class CacheFigures:
    """Rates out of totals: since the reading before, and since the chat began."""

    def __init__(self) -> None:
        self._chat_from = Figures()
        self._last: tuple[float, Figures] | None = None
        self._cache = Cache(None, None, None, 0, 0.0)

    def start_chat(self, totals: Figures) -> None:
        """Count what comes after `totals` as the chat's."""
        self._chat_from = totals

    def update(self, totals: Figures, now: float) -> Cache:
        """Take in totals read at `now`, in seconds. Lower ones are those of a new model."""
        if _less(totals, self._chat_from):
            self._chat_from = Figures()
        if self._last is not None and _less(totals, self._last[1]):
            self._last = None
        before = Figures() if self._last is None else self._last[1]
        rate = None
        if self._last is not None and now > self._last[0]:
            rate = (totals.read_bytes - before.read_bytes) / (now - self._last[0])
        chat = self._chat_from
        self._last = (now, totals)
        return Cache(
            _hit_rate(before, totals),
            _hit_rate(chat, totals),
            rate,
            totals.read_bytes - chat.read_bytes,
            totals.stall_seconds - chat.stall_seconds,
        )


def _less(totals: Figures, before: Figures) -> bool:
    return (
        totals.hits < before.hits
        or totals.misses < before.misses
        or totals.read_bytes < before.read_bytes
    )


def _hit_rate(before: Figures, after: Figures) -> float | None:
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return hits / (hits + misses) if hits + misses else None


class MachinePanel(Widget):
    """Speed, context, memory and experts. It does nothing while it is hidden.

    The parts scroll together, by mouse or by keys when the panel has the focus.
    """

    DEFAULT_CSS = """
    MachinePanel {
        width: 1fr;
        height: 1fr;
        layout: vertical;
        padding: 0 0 0 1;
        & > VerticalScroll {
            height: auto;
            scrollbar-size-vertical: 1;
            scrollbar-size-horizontal: 0;
            scrollbar-gutter: stable;
        }
        & Rows, & HeatMap { margin: 0 1 1 0; }
        & Legend { display: none; }
        &.-compact Rows, &.-compact HeatMap { margin-bottom: 0; }
    }
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        id: str | None = None,  # noqa: A002  Textual's name for it
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._clock = clock
        self._given: tuple[Progress, Reading | None] = (Progress(), None)
        self._shown = False
        self._counted: Reading | None = None
        self._figures = CacheFigures()
        self._cache = Cache(None, None, None, 0, 0.0)
        self._speeds: deque[tuple[int, float]] = deque(maxlen=MINUTE)
        self._reply, self._memory, self._experts = Rows(), Rows(), Rows()
        self._map, self._legend = HeatMap(), Legend()
        self._scroll = VerticalScroll()

    def compose(self) -> ComposeResult:
        """The blocks, the most important first."""
        with self._scroll:
            yield self._reply
            yield self._memory
            yield self._experts
            yield self._map
        yield self._legend

    def show(self, progress: Progress, reading: Reading | None) -> None:
        """Show these figures. While hidden they are only kept, for when the panel is seen."""
        self._given = (progress, reading)
        if self._shown and self.display:
            self._update()

    def start_chat(self) -> None:
        """Let the figures of the chat begin at the reading that was given last."""
        reading = self._given[1]
        if reading is not None:
            self._figures.start_chat(reading.figures)
            self._counted = None

    def on_show(self) -> None:
        """Catch up with what was given while hidden."""
        self._shown = True
        self._update()

    def on_hide(self) -> None:
        """Rest."""
        self._shown = False

    def on_resize(self) -> None:
        """Leave out the less important rows where there are few lines."""
        self.set_class(self._compact, "-compact")
        self._make_room()
        if self._shown:
            self._update()

    @property
    def _compact(self) -> bool:
        return self.size.height < COMPACT_BELOW

    def _make_room(self, legend: bool | None = None) -> None:
        """Show the legend or not; it stands below what scrolls, and is always in view."""
        if legend is not None:
            self._legend.display = legend
        lines = LEGEND_LINES if self._legend.display else 0
        self._scroll.styles.max_height = max(1, self.size.height - lines)

    def _update(self) -> None:
        progress, reading = self._given
        now = self._clock()
        second = int(now)
        if progress.state == "answering":
            if self._speeds and self._speeds[-1][0] == second:
                self._speeds.pop()
            self._speeds.append((second, progress.tokens_per_second))
        trend = tuple(self._speeds)
        self._reply.show(reply_rows(progress, trend, second, compact=self._compact))
        self._show_reading(reading, now)

    def _show_reading(self, reading: Reading | None, now: float) -> None:
        if reading is None:
            self._memory.show(())
            self._experts.show(())
            self._map.show(None)
            self._make_room(legend=False)
            return
        if reading is not self._counted:
            self._counted = reading
            self._cache = self._figures.update(reading.figures, now)
            self._map.show(reading.experts)
            if reading.experts is not None:
                self._legend.tell_places(reading.experts.near, reading.experts.far)
            self._make_room(legend=reading.experts is not None)
        self._memory.show(memory_rows(reading.tiers, compact=self._compact))
        self._experts.show(expert_rows(reading.experts, self._cache, compact=self._compact))

    def on_heat_map_pointed(self, event: HeatMap.Pointed) -> None:
        """Tell what the map points at below it, where it is always in view."""
        event.stop()
        self._legend.show(event.place, event.facts)

    def on_heat_map_moved(self, event: HeatMap.Moved) -> None:
        """Keep the map's cursor in view."""
        event.stop()
        line = Region(0, self._map.virtual_region.y + event.y, 1, 1)
        self._scroll.scroll_to_region(line, animate=False)


def reply_rows(
    progress: Progress, speeds: tuple[tuple[int, float], ...], now: int, *, compact: bool
) -> list[Row]:
    """The running reply; `speeds` are (second, tokens in a second), `now` is the last second."""
    seconds = progress.first_token_seconds
    rows: list[Row] = [
        Heading("Reply", _STATES[progress.state]),
        Trend("speed", speeds, now, _rate(progress.tokens_per_second)),
        _tokens("prompt", progress.prompt_done, progress.prompt_total),
        _tokens("context", progress.context_used, progress.context_size),
        Fact("prompt from cache", _count(progress.reused)),
        Fact("first token after", NONE if seconds is None else _seconds(seconds)),
    ]
    if not compact:
        rows.append(Fact("prompt speed", _rate(progress.prefill_per_second)))
        rows.append(Fact("reply", _count(progress.generated)))
    return rows


def memory_rows(tiers: tuple[Tier, ...], *, compact: bool) -> list[Row]:
    """What lies where. A place that all names begin with is not repeated."""
    places = {tier.name.partition(": ")[0] for tier in tiers if ": " in tier.name}
    rows: list[Row] = [] if compact else [Heading("Memory")]
    for tier in tiers:
        name = tier.name.partition(": ")[2] if len(places) == 1 else ""
        used, total = format_size(tier.used_bytes), tier.total_bytes
        share = tier.used_bytes / total if total else None
        value = used if total is None else _of(used, format_size(total))
        rows.append(Meter(name or tier.name, share, value, used))
    return rows


def expert_rows(experts: ExpertActivity | None, cache: Cache, *, compact: bool) -> list[Row]:
    """How well the store of experts did; nothing of it where all lie in memory from the start."""
    if experts is None:
        return [Heading("Experts", "none in this model")]
    held, all_experts = int(experts.resident.sum()), experts.resident.size
    if held == all_experts and cache.hit_rate_chat is None:
        return [Heading("Experts", f"all experts {experts.near}")]
    rows: list[Row] = [
        Heading("Experts", f"{held:,} of {all_experts:,} {experts.near}"),
        _hits("hits now", cache.hit_rate_now),
        _hits("hits in chat", cache.hit_rate_chat),
    ]
    rate, total = cache.read_bytes_per_second, format_size(cache.read_bytes)
    now = NONE if rate is None else f"{format_size(rate)}/s"
    if compact:
        return [*rows, Fact("disk", f"{now}, {total}")]
    return [
        *rows,
        Fact("read from disk now", now),
        Fact("read from disk in chat", total),
        Fact("waited for the disk", _seconds(cache.stall_seconds)),
    ]


def _tokens(name: str, done: int, of: int) -> Meter:
    if not of:
        return Meter(name, None, NONE)
    return Meter(name, done / of, f"{done:,} / {of:,}", f"{done / of:.0%}")


def _hits(name: str, rate: float | None) -> Meter:
    return Meter(name, rate, NONE if rate is None else f"{rate:.1%}")


def _of(used: str, total: str) -> str:
    """Two sizes, their unit said once where it is the same, or one size where they are."""
    if used == total:
        return total
    number, _, unit = used.partition(" ")
    return f"{number if total.endswith(f' {unit}') else used} / {total}"


def _count(tokens: int) -> str:
    return f"{tokens:,} tokens"


def _rate(per_second: float) -> str:
    if per_second <= 0:
        return NONE
    return f"{_three_digits(per_second)} tokens/s"


def _seconds(seconds: float) -> str:
    return f"{_three_digits(seconds)} s"


def _three_digits(number: float) -> str:
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:,.{decimals}f}"

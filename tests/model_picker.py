"""The model picker in a small app, and a person's hands and eyes at it."""

from __future__ import annotations

import asyncio
import inspect
import time
from functools import wraps
from typing import TYPE_CHECKING, Any

from textual.app import App
from textual.widgets import Button, Static

from tui.screens.dialogs import Confirm
from tui.screens.models import Choice, ModelsScreen
from tui.widgets.download_bar import DownloadBar
from tui.widgets.literal_editors import LiteralInput
from tui.widgets.offer_table import OfferTable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from textual.pilot import Pilot

OPEN = "still open"


class Host(App[None]):
    """An app with nothing but the picker, and what the picker closed with."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.picker = ModelsScreen(**options)
        self.result: Choice | str | None = OPEN

    def on_mount(self) -> None:
        self.push_screen(self.picker, self.keep)

    def keep(self, result: Choice | None) -> None:
        self.result = result


class Hand:
    """A person at the picker: presses, waits, and reads what is on the screen."""

    def __init__(self, app: Host, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def write(self, text: str) -> None:
        self.app.picker.query_one(LiteralInput).focus()
        self.app.picker.query_one(LiteralInput).value = text
        await self.pilot.pause()

    async def until(self, condition: Callable[[], object], what: str = "") -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, f"{what or 'it'} did not come; status: {self.status}"
            await self.pilot.pause(0.02)

    async def point_at(self, name: str) -> None:
        """Filter for one model, and leave the focus in the table."""
        await self.write(name)
        await self.until(lambda: self.offer is not None, name)
        self.table.focus()
        await self.pilot.pause()
        assert self.offer.name == name

    @property
    def table(self) -> OfferTable:
        return self.app.picker.query_one(OfferTable)

    @property
    def offer(self) -> Any:
        return self.table.offer

    @property
    def rows(self) -> list[list[str]]:
        return [[str(c) for c in self.table.get_row_at(i)] for i in range(self.table.row_count)]

    @property
    def status(self) -> str:
        return str(self.app.picker.query_one("#models-status", Static).render())

    @property
    def facts(self) -> str:
        return shown(self.app.picker.query_one(".detail"))

    @property
    def bar(self) -> str:
        bar = self.app.picker.query_one(DownloadBar)
        return str(bar.render()) if bar.display else ""

    @property
    def buttons(self) -> list[str]:
        return [str(b.label) for b in self.app.picker.query(Button) if b.display]

    @property
    def asked(self) -> bool:
        return isinstance(self.app.screen, Confirm)


def shown(widget: Any) -> str:
    """The text in a widget's place on the screen."""
    region = widget.region
    lines = widget.screen._compositor.render_strips()
    return "\n".join(
        line.crop(region.x, region.right).text for line in lines[region.y : region.bottom]
    )


def in_app(size: tuple[int, int] = (80, 24), **options: Any) -> Any:
    """Run a test with the picker open and its list read."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        @wraps(test)
        def run(*args: Any, **fixtures: Any) -> None:
            async def inside() -> None:
                app = Host(**options)
                async with app.run_test(size=size) as pilot:
                    hand = Hand(app, pilot)
                    await hand.until(lambda: hand.table.row_count, "the list")
                    await pilot.pause()
                    await test(hand, *args, **fixtures)

            asyncio.run(inside())

        own = list(inspect.signature(test).parameters.values())[1:]
        run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        return run

    return decorate

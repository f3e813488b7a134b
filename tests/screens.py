"""Screens as text files: what a screen says, and in which styles, for people to review.

A file tests/golden/screens/NAME-WIDTHxHEIGHT.txt holds the version of Textual that drew it, the
lines of the screen without blanks at their ends, then each style under a short name, then the runs
of styles of each line: "5-7 2a 76b" says that lines 5 to 7 have two cells in style a and 76 in b.

A screen that differs is a failed test, which shows the difference and writes the new file beside.
To accept new screens, run the tests with LOCALDS_UPDATE_SCREENS=1 and look at `git diff`.
"""

from __future__ import annotations

import asyncio
import difflib
import os
import time
from importlib.metadata import version
from itertools import count, groupby, islice, product
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING

import pytest
from textual.widgets import Input, TextArea

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chat_app import Driver
    from rich.color import Color
    from rich.segment import Segment
    from rich.style import Style
    from textual.strip import Strip

FOLDER = Path(__file__).parent / "golden" / "screens"
UPDATE = "LOCALDS_UPDATE_SCREENS"
TEXTUAL = ".".join(version("textual").split(".")[:2])

_STILL = 3  # looks that must be alike before a screen counts as drawn
_LOOK_SECONDS = 0.04
_PATIENCE_SECONDS = 10.0
_DIFFERENCE_LINES = 60
_ATTRIBUTES = ("bold", "dim", "italic", "underline", "strike", "reverse", "blink")


async def check_screen(driver: Driver, name: str, folder: Path) -> None:
    """Compare what is on the screen with the file of this name, and of the screen's size.

    Where they differ the new file is written to `folder`. Skips where the file was made by another
    version of Textual, since that draws its own widgets as it likes.
    """
    width, height = driver.app.screen.size
    golden = FOLDER / f"{name}-{width}x{height}.txt"
    if os.environ.get(UPDATE) == "1":
        FOLDER.mkdir(exist_ok=True)
        golden.write_text(await _drawn(driver, ""), encoding="utf-8")
        return
    wanted = golden.read_text(encoding="utf-8") if golden.exists() else ""
    made_by = wanted.partition("\n")[0].removeprefix("Textual ")
    if wanted and made_by != TEXTUAL:
        pytest.skip(f"{golden.name} was drawn by Textual {made_by}; this is Textual {TEXTUAL}")
    shown = await _drawn(driver, wanted)
    if shown != wanted:
        (folder / golden.name).write_text(shown, encoding="utf-8")
        pytest.fail(_explain(golden, wanted, folder / golden.name, shown), pytrace=False)


async def _drawn(driver: Driver, wanted: str) -> str:
    """The screen once nothing moves any more; a slow machine has time to come to `wanted`."""
    end = time.monotonic() + _PATIENCE_SECONDS
    looks: list[str] = []
    while time.monotonic() < end:
        _stop_blinking(driver)
        await driver.pilot.pause()
        await asyncio.sleep(_LOOK_SECONDS)
        working = any(not worker.is_finished for worker in driver.app.workers)
        looks = [] if working else [*looks, describe(_strips(driver))][-_STILL:]
        if len(looks) == _STILL and len(set(looks)) == 1 and (not wanted or looks[0] == wanted):
            return looks[0]
    assert looks, "the screen's workers do not end"
    assert wanted or len(set(looks)) == 1, "the screen does not come to rest"
    return looks[-1]


def _stop_blinking(driver: Driver) -> None:
    for editor in driver.app.screen.query("Input, TextArea"):
        assert isinstance(editor, Input | TextArea)
        editor.cursor_blink = False


def _strips(driver: Driver) -> list[Strip]:
    screen = driver.app.screen
    return screen._compositor.render_strips(screen.size)


def describe(strips: Iterable[Strip]) -> str:
    """The text of a file for these lines."""
    names: dict[str, str] = {}
    texts, runs = [], []
    for strip in strips:
        texts.append(strip.text.rstrip())
        runs.append(" ".join(_runs(strip, names)))
    styles = [f"{name} {style}" for style, name in names.items()]
    parts = [f"Textual {TEXTUAL}", *texts, "", "styles", *styles, "", "runs", *_numbered(runs)]
    return "\n".join(parts) + "\n"


def _runs(strip: Strip, names: dict[str, str]) -> Iterator[str]:
    def style(segment: Segment) -> str:
        return _look(segment.style)

    for look, segments in groupby(strip, style):
        cells = sum(segment.cell_length for segment in segments)
        if cells:
            yield f"{cells}{names.setdefault(look, _name(len(names)))}"


def _look(style: Style | None) -> str:
    """A style in words: "#e6e8eb on #14171b bold"."""
    if style is None:
        return "none"
    attributes = [attribute for attribute in _ATTRIBUTES if getattr(style, attribute)]
    return " ".join([f"{_colour(style.color)} on {_colour(style.bgcolor)}", *attributes])


def _colour(colour: Color | None) -> str:
    if colour is None:
        return "default"
    return colour.triplet.hex if colour.triplet else colour.name


def _name(index: int) -> str:
    """a to z, A to Z, then aa, ab, ..."""
    letters = ascii_lowercase + ascii_uppercase
    names = ("".join(name) for n in count(1) for name in product(letters, repeat=n))
    return next(islice(names, index, None))


def _numbered(runs: list[str]) -> Iterator[str]:
    """Lines with their numbers; neighbours that are alike together."""
    line = 1
    for same, group in groupby(runs):
        end = line + sum(1 for _ in group) - 1
        yield f"{line} {same}" if end == line else f"{line}-{end} {same}"
        line = end + 1


def _explain(golden: Path, wanted: str, new: Path, shown: str) -> str:
    lines = list(
        difflib.unified_diff(
            wanted.splitlines(), shown.splitlines(), str(golden), str(new), lineterm="", n=1
        )
    )
    left_out = len(lines) - _DIFFERENCE_LINES
    more = [f"... {left_out} lines more"] if left_out > 0 else []
    what = "is another screen now" if wanted else "is not there yet"
    return "\n".join(
        [
            f"{golden.name} {what}",
            *lines[:_DIFFERENCE_LINES],
            *more,
            f"The new screen is {new}",
            f"To accept it: {UPDATE}=1 pytest tests/test_snapshots.py",
        ]
    )

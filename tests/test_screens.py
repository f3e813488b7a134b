"""The comparison of screens with files: what fails, what is accepted, what is skipped."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import screens
from chat_app import Driver, in_loop
from rich.style import Style
from screens import check_screen, describe
from textual.app import App, ComposeResult
from textual.strip import Segment, Strip
from textual.widgets import Input, Static

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Small(App[None]):
    def compose(self) -> ComposeResult:
        yield Static("a text", id="text")
        yield Input()


@asynccontextmanager
async def small() -> AsyncIterator[Driver]:
    app = Small()
    async with app.run_test(size=(20, 6)) as pilot:
        yield Driver(app, pilot)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file of the small app's screen belongs; there is none yet."""
    folder = tmp_path / "golden"
    monkeypatch.setattr(screens, "FOLDER", folder)
    monkeypatch.setattr(screens, "_PATIENCE_SECONDS", 1.0)
    monkeypatch.delenv(screens.UPDATE, raising=False)
    return folder / "small-20x6.txt"


async def accept(driver: Driver, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(screens.UPDATE, "1")
        await check_screen(driver, "small", folder)


@in_loop
async def test_a_screen_without_a_file_fails_and_is_written_beside(
    tmp_path: Path, golden: Path
) -> None:
    async with small() as driver:
        with pytest.raises(pytest.fail.Exception, match="LOCALDS_UPDATE_SCREENS=1 pytest"):
            await check_screen(driver, "small", tmp_path)
        assert not golden.exists()
        await accept(driver, tmp_path)
        assert golden.read_text() == (tmp_path / golden.name).read_text()
        await check_screen(driver, "small", tmp_path)


@pytest.mark.parametrize("change", ["text", "style"])
@in_loop
async def test_another_text_or_style_fails(tmp_path: Path, change: str) -> None:
    async with small() as driver:
        await accept(driver, tmp_path)
        text = driver.app.query_one("#text", Static)
        if change == "text":
            text.update("a test")
        else:
            text.styles.text_style = "bold"
        with pytest.raises(pytest.fail.Exception, match=r"(?m)^\+") as failure:
            await check_screen(driver, "small", tmp_path)
        assert str(tmp_path / "small-20x6.txt") in str(failure.value)


@in_loop
async def test_files_of_another_textual_are_skipped(tmp_path: Path, golden: Path) -> None:
    async with small() as driver:
        await accept(driver, tmp_path)
        golden.write_text(golden.read_text().replace(screens.TEXTUAL, "0.1", 1))
        with pytest.raises(pytest.skip.Exception, match=r"Textual 0\.1"):
            await check_screen(driver, "small", tmp_path)


def test_lines_that_are_alike_share_their_runs() -> None:
    red, wide = Style(color="#ff0000", bold=True), Segment("日本", Style(bgcolor="#000000"))
    lines = [Strip([Segment("ab", red), wide, Segment(" ")]), Strip([Segment("cd", red)])]
    assert describe([*lines, lines[1]]).splitlines()[1:] == [
        "ab日本",
        "cd",
        "cd",
        "",
        "styles",
        "a #ff0000 on default bold",
        "b default on #000000",
        "c none",
        "",
        "runs",
        "1 2a 4b 1c",
        "2-3 2a",
    ]

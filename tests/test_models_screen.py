"""The model picker in a running app: what it shows, and choosing with keys and mouse."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fake_hub import closed_port, go_to
from hub_home import REPOSITORY, SMALL, install
from model_picker import OPEN, Hand, Host, in_app, shown
from offloading import budget_for
from textual.widgets import Button

from localds.catalog.resolve import DEMO, DEMO_TITLE, find_model
from localds.limits import Peaks
from localds.memory import report as memory_report
from tui import model_fit
from tui.screens.models import Choice
from tui.widgets.download_bar import format_duration
from tui.widgets.literal_editors import LiteralInput
from tui.widgets.offer_table import OfferTable

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def installed(home: Path) -> Path:
    """The guide as an installed model, "tiny:Q4_K_M", and the folder of its file."""
    return install(home, REPOSITORY, {SMALL: DEMO.read_bytes()})


def check_layout(hand: Hand) -> tuple[Any, Any]:
    """All parts lie on the screen, none over another; table and details."""
    screen = hand.app.screen.region
    ids = ("#models-title", LiteralInput, OfferTable, ".detail", "#models-keys")
    regions = [hand.app.picker.query_one(one).region for one in ids]
    for i, region in enumerate(regions):
        assert region.area > 0 and screen.contains_region(region)
        assert not any(region.overlaps(other) for other in regions[:i])
    for button in hand.app.picker.query(Button):
        assert not button.display or screen.contains_region(button.region)
    return regions[2], regions[3]


@in_app(size=(80, 24))
async def test_narrow_has_the_details_below(hand: Hand) -> None:
    table, detail = check_layout(hand)
    assert detail.y >= table.bottom and table.height >= 8
    text = shown(hand.table)
    assert "Model" in text and "Quant" in text and "Fits" in text
    assert "▸ the built-in guide to localds" in text
    assert text.count("in memory") + text.count("from disk") + text.count("no room") >= 6
    assert "all in memory" in hand.facts and "License" in hand.facts


@in_app(size=(200, 60))
async def test_wide_has_the_details_beside(hand: Hand) -> None:
    table, detail = check_layout(hand)
    assert detail.x >= table.right and table.height >= 40
    await hand.write("coder q8_0")
    assert "DeepSeek Coder V2 Lite Instruct " in shown(hand.table)
    assert "bartowski/DeepSeek-Coder-V2-Lite-Instruct-GGUF" in hand.facts


@in_app(size=(80, 24))
async def test_the_pointer_is_a_sign_on_one_row(hand: Hand) -> None:
    for _ in range(3):
        marks = [row[0] for row in hand.rows]
        assert marks.index("▸") == hand.table.cursor_row and marks.count("▸") == 1
        await hand.press("down")


@in_app()
async def test_typing_filters_from_anywhere(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    await hand.press(*"tiny")
    assert [row[1:3] for row in hand.rows] == [["Tiny Chat", "Q4_K_M"], ["Tiny Chat", "Q8_0"]]
    await hand.press("down", "q", "8")  # from the table, too
    field = hand.app.picker.query_one(LiteralInput)
    assert field.value == "tinyq8" and field.has_focus
    assert hand.rows == [] and "No model matches" in hand.facts
    await hand.press("backspace", "backspace", "space", "8", "_")
    assert [row[2] for row in hand.rows] == ["Q8_0"]
    await hand.press("down", "backspace")
    assert field.value == "tiny 8"
    await hand.press("enter")
    await hand.until(lambda: hand.status.startswith("! owner/Tiny-Chat-GGUF: cannot reach"))


@in_app()
async def test_letters_in_the_filter_are_no_commands(hand: Hand) -> None:
    await hand.press(*"dxcs")
    assert hand.app.picker.query_one(LiteralInput).value == "dxcs"
    assert hand.status == "" and not hand.asked
    assert "List Down" in hand.buttons and "Filter /" not in hand.buttons


@in_app()
async def test_up_from_the_first_row_and_slash_go_to_the_filter(hand: Hand) -> None:
    field = hand.app.picker.query_one(LiteralInput)
    await hand.press("down")
    assert hand.table.has_focus and hand.table.cursor_row == 1
    await hand.press("up", "up")
    assert field.has_focus
    await hand.press("down", "slash")
    assert field.has_focus and field.value == ""


@in_app()
async def test_enter_chooses(hand: Hand, installed: Path) -> None:
    assert installed
    await hand.press(*"tiny q4", "enter")
    assert hand.app.result == Choice("tiny:Q4_K_M", "Tiny Chat (Q4_K_M)")
    assert find_model("tiny:Q4_K_M").path == installed / SMALL


@in_app()
async def test_the_guide_is_chosen_by_its_path(hand: Hand) -> None:
    await hand.press("enter")
    assert hand.app.result == Choice(str(DEMO), DEMO_TITLE)


@in_app()
async def test_escape_closes_without_a_choice(hand: Hand) -> None:
    await hand.press("x", "escape")
    assert hand.app.result is None


@in_app(current="tiny:Q4_K_M")
async def test_the_one_in_use_is_marked_and_chosen(hand: Hand, installed: Path) -> None:
    assert installed
    assert hand.offer.name == "tiny:Q4_K_M"
    assert hand.rows[hand.table.cursor_row][4] == "in use"
    hand.table.focus()
    await hand.press("x")
    await hand.until(lambda: "is in use; load another model before" in hand.status)
    assert not hand.asked and "Remove x" not in hand.buttons


@in_app()
async def test_a_path_in_the_filter_is_offered_first(hand: Hand, tmp_path: Path) -> None:
    path = tmp_path / "my [red]model.gguf"
    path.write_bytes(DEMO.read_bytes())
    await hand.write(f"'{path}' ")
    await hand.until(lambda: hand.offer)
    assert hand.rows[0][1].strip() == "my [red]model"
    assert hand.offer.state == "file" and "all in memory" in hand.facts
    hand.table.focus()
    await hand.press("x")
    assert "remove this file yourself" in hand.status
    await hand.press("enter")
    assert hand.app.result == Choice(str(path), "my [red]model")


@in_app()
async def test_paths_that_are_no_models(hand: Hand, tmp_path: Path) -> None:
    await hand.write(str(tmp_path / "absent.gguf"))
    await hand.pilot.pause(0.2)
    assert hand.rows == []
    await hand.write("~nobody-by-this-name/x.gguf")
    await hand.pilot.pause(0.2)
    assert hand.rows == []
    (tmp_path / "text.gguf").write_text("<html>")
    await hand.write(str(tmp_path / "text.gguf"))
    await hand.until(lambda: hand.offer)
    assert hand.offer.state == "broken"
    await hand.press("enter")
    assert "seems to be a web page" in hand.status and hand.app.result == OPEN


@in_app(size=(200, 60))
async def test_a_click_moves_and_a_double_click_chooses(hand: Hand, installed: Path) -> None:
    assert installed
    await hand.pilot.click(OfferTable, offset=(10, 2))  # below the headings: the second row
    await hand.pilot.pause()
    assert hand.table.cursor_row == 1 and hand.app.result == OPEN
    await hand.pilot.click(OfferTable, offset=(10, 0))
    await hand.pilot.pause(0.6)  # longer than between the clicks of a double one
    await hand.pilot.click(OfferTable, offset=(10, 2))
    await hand.pilot.pause(0.6)
    assert hand.table.cursor_row == 1 and hand.app.result == OPEN
    await hand.pilot.click(OfferTable, offset=(10, 2), times=2)
    await hand.pilot.pause()
    assert hand.app.result == Choice("tiny:Q4_K_M", "Tiny Chat (Q4_K_M)")


@in_app()
async def test_buttons_do_what_keys_do(hand: Hand, installed: Path) -> None:
    await hand.write("tiny q4")
    await hand.pilot.click("#models-key-remove")
    await hand.until(lambda: hand.asked)
    await hand.pilot.click("#yes")
    await hand.until(lambda: hand.status.startswith("Removed"))
    assert not (installed / SMALL).exists()
    await hand.pilot.click("#models-key-close")
    assert hand.app.result is None


@pytest.fixture
def broken_list(home: Path) -> None:
    (home / "config/localds/models.toml").write_text("[tiny")


@in_app()
async def test_a_broken_list_of_models_is_shown(hand: Hand, broken_list: None) -> None:
    assert broken_list is None
    assert [row[1].strip() for row in hand.rows] == [DEMO_TITLE, "models.toml"]
    await hand.press("down")
    assert "this is not TOML" in " ".join(hand.facts.split())
    await hand.press("enter")
    assert hand.status.startswith("!") and hand.app.result == OPEN


def test_a_setting_that_is_no_size_is_shown() -> None:
    async def show() -> None:
        app = Host(ram="plenty")
        async with app.run_test() as pilot:
            hand = Hand(app, pilot)
            await hand.until(lambda: hand.status.startswith("! size 'plenty'"))
            await hand.press("escape")
            assert app.result is None

    asyncio.run(show())


@pytest.fixture
def hostile(home: Path) -> None:
    install(home, "a/[bold]b[/bold]", {"\x1b[31mx[green]\n-Q4_K_M.gguf": b"GGUF\x1b[2J"})


@in_app(size=(200, 60))
async def test_names_of_strangers_are_shown_as_they_are(hand: Hand, hostile: None) -> None:
    assert hostile is None
    await hand.point_at("a/[bold]b[/bold]:Q4_K_M")
    text = shown(hand.app.screen)
    assert "a/[bold]b[/bold]" in text
    assert "\x1b" not in text and r"\x1b[31mx[green]" in text


@in_app(context=2048, ram=str(budget_for(DEMO, 20, 2048)))
async def test_the_speed_is_measured_when_asked_for(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_report, "measure_peaks", lambda _ram=None: Peaks(20e9, 400e9, 100e9))
    monkeypatch.setattr(memory_report, "measure_disk", lambda _paths: 2e9)
    monkeypatch.setattr(model_fit, "_speeds", {})
    assert "Measure speed s" not in hand.buttons and "Measure speed" in hand.buttons
    hand.table.focus()
    await hand.press("s")
    await hand.until(lambda: "tokens/s" in hand.facts)
    assert "25% of the experts in memory" in hand.facts
    assert hand.status == ""


def test_times_are_said_as_people_do() -> None:
    seconds = (0.2, 59, 61, 3599, 3661, 90_000)
    assert [format_duration(s) for s in seconds] == [
        "1 s",
        "59 s",
        "1 min",
        "1 h 0 min",
        "1 h 1 min",
        "25 h 0 min",
    ]

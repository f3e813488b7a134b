"""Downloads and removals in the model picker, against a hub on this machine."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import pytest
from fake_hub import closed_port, go_to, sha256
from hub_home import FILES, PARTS, REPOSITORY, SMALL, install
from model_picker import OPEN, Hand, Host, in_app, shown

from localds.catalog.resolve import DEMO, DEMO_TITLE, find_model
from tui.screens.models import Choice
from tui.widgets.offer_browser import OfferBrowser

if TYPE_CHECKING:
    from pathlib import Path

    from fake_hub import FakeHub

pytestmark = pytest.mark.usefixtures("home")
BLOBS = "hf/hub/models--owner--Tiny-Chat-GGUF/blobs"


@pytest.fixture
def installed(home: Path) -> Path:
    """The guide as an installed model, "tiny:Q4_K_M", and the folder of its file."""
    return install(home, REPOSITORY, {SMALL: DEMO.read_bytes()})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localds.hub.transfer.time.sleep", lambda _: None)


def part_file(home: Path) -> Path:
    return home / BLOBS / f"{sha256(FILES[SMALL])}.localds-part"


def ranges(hub: FakeHub) -> list[str | None]:
    """What was asked of the file, request by request."""
    return [asked for kind, path, asked in hub.requests if kind == "GET" and path.endswith(SMALL)]


@in_app()
async def test_a_download_to_its_end(hand: Hand, model_hub: FakeHub) -> None:
    assert model_hub
    await hand.point_at("tiny:Q4_K_M")
    await hand.press("d")
    await hand.until(lambda: "is installed; Enter loads it" in hand.status)
    path = find_model("tiny:Q4_K_M").path
    assert sha256(path.read_bytes()) == sha256(FILES[SMALL])
    # Random bytes are no model, which is seen at once.
    await hand.until(lambda: hand.offer.path == path)
    assert hand.offer.state == "broken" and hand.app.result == OPEN
    await hand.press("enter")
    assert hand.status.startswith("!") and hand.app.result == OPEN


@in_app()
async def test_enter_downloads_and_then_loads(hand: Hand, model_hub: FakeHub) -> None:
    await hand.point_at("tiny:Q8_0")
    assert "Download and load Enter" in hand.buttons
    await hand.press("enter")
    await hand.until(lambda: hand.app.result != OPEN)
    assert hand.app.result == Choice("tiny:Q8_0", "Tiny Chat (Q8_0)")
    assert model_hub.downloaded() == list(PARTS)
    folder = find_model("tiny:Q8_0").path.parent.parent
    assert [(folder / name).read_bytes() for name in PARTS] == [FILES[name] for name in PARTS]


@in_app()
async def test_stopped_in_the_middle_it_goes_on(hand: Hand, model_hub: FakeHub, home: Path) -> None:
    model_hub.hold[SMALL] = 1_200_000
    await hand.point_at("tiny:Q4_K_M")
    await hand.press("d")
    await hand.until(lambda: "40%" in hand.bar and "1.14 MiB of 2.86 MiB" in hand.bar, "40%")
    assert "Stop the download c" in hand.buttons and "Download d" not in hand.buttons
    await hand.press("c")
    assert "Stopping the download" in hand.bar
    model_hub.go.set()
    await hand.until(lambda: "stopped; d goes on" in hand.status)
    have = part_file(home).stat().st_size
    assert 1_200_000 <= have < 3_000_000
    assert part_file(home).read_bytes() == FILES[SMALL][:have]
    await hand.until(lambda: hand.offer.state == "partly downloaded")
    percent = 100 * have // 3_000_000
    assert hand.rows[hand.table.cursor_row][4] == f"{percent}% here"
    assert f"partly downloaded: {percent}%" in hand.facts
    await hand.press("d")
    await hand.until(lambda: "is installed" in hand.status)
    assert ranges(model_hub) == [None, f"bytes={have}-"]  # nothing came twice
    assert find_model("tiny:Q4_K_M").path.read_bytes() == FILES[SMALL]


@in_app()
async def test_closing_in_a_download_asks(hand: Hand, model_hub: FakeHub, home: Path) -> None:
    model_hub.hold[SMALL] = 1_200_000
    await hand.point_at("tiny:Q4_K_M")
    await hand.press("d")
    await hand.until(lambda: "40%" in hand.bar)
    await hand.press("escape")
    assert hand.asked
    await hand.press("escape")  # the question, not the picker
    assert not hand.asked and hand.app.result == OPEN and "Downloading" in hand.bar
    await hand.press("escape", "y")
    assert hand.app.result is None
    model_hub.go.set()
    await hand.until(lambda: not downloads())
    assert 1_200_000 <= part_file(home).stat().st_size < 3_000_000


@in_app()
async def test_choosing_another_in_a_download_asks(
    hand: Hand, model_hub: FakeHub, installed: Path
) -> None:
    assert installed
    model_hub.hold[PARTS[0]] = 1000
    await hand.point_at("tiny:Q8_0")
    await hand.press("d")
    await hand.until(lambda: hand.bar)
    await hand.press("x")
    assert "is being downloaded" in hand.status
    await hand.point_at("tiny:Q4_K_M")
    await hand.press("enter")
    assert hand.asked and hand.app.result == OPEN
    await hand.press("y")
    assert hand.app.result == Choice("tiny:Q4_K_M", "Tiny Chat (Q4_K_M)")


@in_app()
async def test_a_second_download_waits_for_the_first(hand: Hand, model_hub: FakeHub) -> None:
    model_hub.hold[SMALL] = 1000
    await hand.point_at("tiny:Q4_K_M")
    await hand.press("d")
    await hand.until(lambda: hand.bar)
    await hand.point_at("tiny:Q8_0")
    await hand.press("d")
    assert "Tiny Chat (Q4_K_M) is being downloaded; c" in hand.status
    model_hub.go.set()
    await hand.until(lambda: "is installed" in hand.status)
    assert model_hub.downloaded() == [SMALL]


def downloads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("download ")]


def test_leaving_the_app_in_a_download_ends_at_once(model_hub: FakeHub, home: Path) -> None:
    """Although the hub sends nothing, so that the download waits for it."""
    model_hub.hold[SMALL] = 1_200_000

    async def leave() -> None:
        app = Host()
        async with app.run_test() as pilot:
            hand = Hand(app, pilot)
            await hand.until(lambda: hand.table.row_count)
            await hand.point_at("tiny:Q4_K_M")
            await hand.press("d")
            await hand.until(lambda: "40%" in hand.bar)
            app.exit()

    started = time.monotonic()
    asyncio.run(leave())  # waits for all workers
    left = time.monotonic()
    assert left - started < 8  # the hub would be waited for 10 s
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("download "))
    model_hub.go.set()
    while downloads():
        assert time.monotonic() < left + 10
        time.sleep(0.02)
    have = part_file(home).stat().st_size
    assert part_file(home).read_bytes() == FILES[SMALL][:have]
    assert 1_200_000 <= have < 3_000_000


async def failed(hand: Hand) -> str:
    """The message of a download that fails."""
    await hand.point_at("tiny:Q4_K_M")
    await hand.press("d")
    await hand.until(lambda: hand.status.startswith("!"))
    assert hand.bar == "" and hand.app.result == OPEN
    assert "Download d" in hand.buttons
    return " ".join(hand.status.split())


@in_app()
async def test_no_connection_is_told(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    text = await failed(hand)
    assert "cannot reach http://127.0.0.1" in text
    assert "check the connection and download it again (d), what is there is kept" in text


@in_app()
async def test_a_gated_model_is_told(hand: Hand, model_hub: FakeHub) -> None:
    model_hub.denial = (403, "GatedRepo")
    text = await failed(hand)
    assert f"accept the terms on {model_hub.url}/{REPOSITORY}, then log in" in text
    assert "set HF_TOKEN" in text


@in_app()
async def test_a_full_disk_is_told(
    hand: Hand, model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_hub
    monkeypatch.setattr("localds.hub.cache.free_room", lambda: 1000)
    text = await failed(hand)
    assert "has room for 0.0 GB; free some, or set HF_HOME" in text
    await hand.until(lambda: hand.rows[0][5] == "no room")
    assert "free some, or set HF_HOME" in " ".join(hand.facts.split())


@in_app()
async def test_wrong_bytes_are_told_and_not_kept(
    hand: Hand, model_hub: FakeHub, home: Path
) -> None:
    model_hub.changed[SMALL] = FILES[SMALL][:-1] + b"?"
    text = await failed(hand)
    assert "does not have the hash that the hub states, and was removed" in text
    assert not part_file(home).exists()
    assert hand.offer.state == "not installed"


@in_app()
async def test_a_broken_connection_is_told_and_what_came_kept(
    hand: Hand, model_hub: FakeHub, home: Path, impatient: None
) -> None:
    assert impatient is None
    model_hub.cut[SMALL] = [1_000_000, *[0] * 9]
    text = await failed(hand)
    assert "download it again (d)" in text
    assert part_file(home).stat().st_size == 1_000_000
    await hand.until(lambda: hand.rows[0][4] == "33% here")


@in_app()
async def test_removing_asks_and_takes_no_for_an_answer(hand: Hand, installed: Path) -> None:
    await hand.point_at("tiny:Q4_K_M")
    await hand.press("x")
    await hand.until(lambda: hand.asked)
    assert "Remove Tiny Chat (Q4_K_M)?" in shown(hand.app.screen)
    assert "12.6 MiB will be free again" in shown(hand.app.screen)
    await hand.press("enter")  # which is "no" at first
    assert (installed / SMALL).exists() and not hand.asked
    await hand.press("delete")
    await hand.until(lambda: hand.asked)
    await hand.press("y")
    await hand.until(lambda: hand.status.startswith("Removed Tiny Chat (Q4_K_M); 12.6 MiB"))
    assert not (installed / SMALL).exists()
    await hand.until(lambda: hand.offer.state == "not installed")


@in_app()
async def test_removing_what_is_unfinished(hand: Hand, home: Path) -> None:
    part_file(home).parent.mkdir(parents=True)
    part_file(home).write_bytes(FILES[SMALL][:4096])
    await hand.point_at("tiny:Q4_K_M")
    hand.app.picker.query_one(OfferBrowser).look()
    await hand.until(lambda: hand.offer.stray_bytes == 4096)
    await hand.press("x")
    await hand.until(lambda: hand.asked)
    assert "All unfinished downloads of owner/Tiny-Chat-GGUF go." in shown(hand.app.screen)
    await hand.press("y")
    await hand.until(lambda: hand.status.startswith("Removed"))
    assert not part_file(home).exists()


@in_app()
async def test_what_cannot_be_removed_is_told(hand: Hand) -> None:
    await hand.press("down", "x")
    assert hand.status == "DeepSeek V2 Lite Chat (Q3_K_M) is not on this machine."
    await hand.press("up", "x")
    assert hand.status == "The built-in guide is a part of localds and stays."
    await hand.press("d")
    assert hand.status == f"{DEMO_TITLE} is on this machine already."


@in_app()
async def test_a_removal_that_fails_is_told(
    hand: Hand, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert installed

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "blob")

    await hand.point_at("tiny:Q4_K_M")
    await hand.press("x")
    await hand.until(lambda: hand.asked)
    monkeypatch.setattr("localds.catalog.remove.remove", fail)
    await hand.press("y")
    await hand.until(lambda: "! [Errno 13] Permission denied" in hand.status)

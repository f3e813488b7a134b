"""The models on offer: what is listed, in which state, and what is said about its fit."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import ggufs
import pytest
from fake_hub import sha256
from hub_home import FILES, PARTS, REPOSITORY, SMALL, install
from offloading import budget_for
from typer.testing import CliRunner

from localds.catalog.known import known_models
from localds.catalog.names import parse
from localds.catalog.pull import fetch, plan
from localds.catalog.resolve import DEMO, find_model
from localds.cli import app
from localds.gguf import GGUFFile
from localds.limits import Peaks
from localds.memory import report as memory_report
from localds.memory.plan import make_plan
from localds.models import read_geometry
from localds.units import format_size
from tui import download_meter, model_fit
from tui.download_meter import Meter, StoppedError
from tui.model_download import Download
from tui.model_fit import Conditions, measure_speed
from tui.models_on_offer import file_offer, offers
from tui.unfinished import note_download

if TYPE_CHECKING:
    from pathlib import Path

    from fake_hub import FakeHub

    from tui.models_on_offer import Offer

pytestmark = pytest.mark.usefixtures("home")
SLOTS = 80  # of the guide: 16 experts in 5 layers
LEAST = 12  # slots: three times the 4 experts of a token
BLOBS = "hf/hub/models--owner--Tiny-Chat-GGUF/blobs"


def listed(**conditions: int | str) -> dict[str, Offer]:
    return {offer.name: offer for offer in offers(Conditions(**conditions))}  # type: ignore[arg-type]


def put_part(home: Path, name: str, size: int) -> None:
    (home / BLOBS).mkdir(parents=True, exist_ok=True)
    (home / BLOBS / f"{sha256(FILES[name])}.localds-part").write_bytes(FILES[name][:size])


def whole_bytes(path: Path) -> int:
    with GGUFFile.open(path) as gguf:
        return make_plan(gguf, read_geometry(gguf), 2048).total


def test_without_models_there_are_the_guide_and_all_that_are_known() -> None:
    found = list(listed().values())
    known = [f"{m.name}:{q}" for m in known_models().values() for q in m.quants]
    assert [offer.name for offer in found] == ["guide", *known]
    assert {offer.state for offer in found[1:]} == {"not installed"}
    guide, tiny = found[0], found[-2]
    assert (guide.state, guide.path, guide.size_bytes) == ("built-in", DEMO, DEMO.stat().st_size)
    assert (guide.name_or_path, guide.context, guide.license) == (str(DEMO), 2048, "mit")
    assert (tiny.label, tiny.size_bytes, tiny.path) == ("Tiny Chat (Q4_K_M)", 3_000_000, None)
    assert (tiny.context, tiny.license, tiny.parameters) == (2048, "mit", "1M")
    assert guide.can_load and not guide.can_download and not guide.can_remove
    assert tiny.can_download and not tiny.can_load and not tiny.can_remove


def test_installed_models_come_first_and_are_not_offered_twice(home: Path) -> None:
    install(home, REPOSITORY, {SMALL: DEMO.read_bytes()})
    snapshot = install(home, "some/Guide", {"Guide-F16.gguf": DEMO.read_bytes()})
    names = [offer.name for offer in offers(Conditions())]
    assert names[:3] == ["guide", "tiny:Q4_K_M", "some/Guide:F16"]
    assert names.count("tiny:Q4_K_M") == 1 and "tiny:Q8_0" in names
    found = listed()["some/Guide:F16"]
    assert (found.title, found.quant, found.state) == ("some/Guide", "F16", "installed")
    assert (found.path, found.license) == (snapshot / "Guide-F16.gguf", "mit")
    assert find_model(found.name_or_path).path == found.path
    assert found.is_called("some/Guide:F16") and found.is_called(str(found.path))
    assert not found.is_called("guide") and not found.is_called(str(DEMO))


@pytest.mark.parametrize(
    ("spare", "kind"), [(0, "in memory"), (-1, "from disk")], ids=["enough", "a byte short"]
)
def test_all_in_memory_as_long_as_the_plan_fits(spare: int, kind: str) -> None:
    ram = whole_bytes(DEMO) + spare
    fit = listed(ram=str(ram), context=2048)["guide"].fit
    assert fit.kind == kind
    if kind == "in memory":
        number, unit = format_size(ram).split()
        assert fit.text == f"all in memory, {number} of {number} {unit}"


def test_a_share_of_the_experts_is_in_memory() -> None:
    ram = str(budget_for(DEMO, 20, 2048))
    fit = listed(ram=ram)["guide"].fit
    assert (fit.kind, fit.text) == (
        "from disk",
        f"{100 * 20 // SLOTS}% of the experts in memory, others from disk",
    )


def test_less_than_the_least_does_not_fit() -> None:
    least = budget_for(DEMO, LEAST, 2048)
    assert listed(ram=str(least))["guide"].fit.kind == "from disk"
    short = listed(ram=str(least - 960))["guide"].fit  # bytes of the cache for one token
    assert short.kind == "too large"
    assert short.text == (
        f"does not fit: needs at least {format_size(least)}; a context of 2047 tokens would fit"
    )
    tiny = listed(ram="1MB")["guide"].fit
    assert tiny.text == f"does not fit: needs at least {format_size(least)}"


def test_a_ram_that_is_no_size_is_told() -> None:
    with pytest.raises(ValueError, match="size 'much' is not understood"):
        offers(Conditions(ram="much"))


def test_what_the_loaded_model_gives_back_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_fit, "budget_for", lambda ram: 1000 if ram is None else 7)
    assert Conditions(freed=24).budget() == 1024
    assert Conditions(ram="7", freed=24).budget() == 7  # a limit, whatever else is there
    monkeypatch.setattr(model_fit, "budget_for", lambda _: None)
    assert Conditions(freed=24).budget() is None


def test_the_speed_is_that_of_inspect_once_it_was_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert home
    monkeypatch.setattr(memory_report, "measure_peaks", lambda _ram=None: Peaks(20e9, 400e9, 100e9))
    monkeypatch.setattr(memory_report, "measure_disk", lambda _paths: 2e9)
    monkeypatch.setattr(model_fit, "_speeds", {})
    ram = str(budget_for(DEMO, 20, 2048))
    conditions = Conditions(context=2048, ram=ram)
    measure_speed(DEMO, conditions)
    words = ["inspect", str(DEMO), "--ram", ram, "--context", "2048", "--json"]
    report = json.loads(CliRunner().invoke(app, words).stdout)["placement"]
    told = file_offer(DEMO, conditions).fit.text
    assert told.endswith(f"from disk: at most {report['expected_tokens_per_second']:.3g} tokens/s")
    assert "tokens/s" not in file_offer(DEMO, Conditions(context=1024, ram=ram)).fit.text


def test_by_size_it_is_about_a_gigabyte_more_than_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_fit, "total_memory", lambda: 2_000_000_000)
    enough = listed(ram="1003000000")["tiny:Q4_K_M"].fit
    assert (enough.kind, enough.text) == ("in memory", "all in memory, about 957 of 957 MiB")
    short = listed(ram="1002999999")["tiny:Q4_K_M"].fit
    assert (short.kind, short.text) == (
        "from disk",
        "wants about 957 MiB, more than 957 MiB: experts from disk, at the speed of the disk",
    )
    monkeypatch.setattr(model_fit, "budget_for", lambda _: 1_002_999_999)
    assert listed()["tiny:Q4_K_M"].fit.text.endswith("from disk, unless other programs end")


def test_a_full_disk_is_told_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localds.hub.cache.free_room", lambda: 2_999_999)
    found = listed()
    assert "set HF_HOME to a folder on a larger disk" in (found["tiny:Q4_K_M"].room or "")
    assert found["tiny:Q8_0"].room is None


def test_broken_and_foreign_files_say_what_they_are(home: Path) -> None:
    foreign = ggufs.build({"general.architecture": "qwen2"})
    install(home, "some/Mix", {"a-Q2_K.gguf": b"GGUF" + bytes(99), "b-Q8_0.gguf": foreign})
    found = listed()
    broken, other = found["some/Mix:Q2_K"], found["some/Mix:Q8_0"]
    assert (broken.state, other.state) == ("broken", "other kind")
    assert broken.fit.kind == other.fit.kind == "cannot run"
    assert "a-Q2_K.gguf" in broken.fit.text
    assert "architecture 'qwen2' is not one that localds runs" in other.fit.text
    assert not broken.can_load and not broken.can_download and broken.can_remove


def test_a_broken_list_of_models_is_told_beside_the_guide(home: Path) -> None:
    (home / "config/localds/models.toml").write_text('[tiny]\ntitel = "Tiny"')
    guide, broken = offers(Conditions())
    assert (guide.name, guide.state) == ("guide", "built-in")
    assert (broken.state, broken.path, broken.can_remove) == ("broken", None, False)
    assert "models.toml: [tiny]: titel is not a key; write title" in broken.fit.text


def test_how_far_a_download_is(model_hub: FakeHub, home: Path) -> None:
    assert model_hub
    put_part(home, SMALL, 1_110_000)
    note_download("tiny:Q4_K_M", plan(parse("tiny:Q4_K_M")))
    found = listed()
    partly = found["tiny:Q4_K_M"]
    assert (partly.state, partly.have, partly.size_bytes) == (
        "partly downloaded",
        1_110_000,
        3_000_000,
    )
    assert partly.can_download and partly.can_remove
    assert found["tiny:Q8_0"].state == "not installed"
    assert found["tiny:Q8_0"].stray_bytes == 0  # the note says whose they are
    names = list(found)
    assert names.index("tiny:Q4_K_M") == 1  # before what is not here at all


def test_of_a_split_model_whole_files_count(model_hub: FakeHub, home: Path) -> None:
    model_hub.cut[PARTS[1]] = [100_000] * 9
    pull = plan(parse("tiny:q8_0"))
    note_download("tiny:Q8_0", pull)
    stop = threading.Event()

    class StopInSecondFile(Meter):
        def advance(self, size: int) -> None:
            super().advance(size)
            if self.read().done > len(FILES[PARTS[0]]) + 50_000:
                stop.set()
                self.go_on()

    with pytest.raises(StoppedError):
        fetch(pull, StopInSecondFile(stop))
    part = next((home / BLOBS).glob("*-part")).stat().st_size
    found = listed()["tiny:Q8_0"]
    assert found.have == len(FILES[PARTS[0]]) + part
    assert found.size_bytes == sum(len(FILES[name]) for name in PARTS)
    assert found.variant is not None and found.variant.files == PARTS


def test_parts_that_nobody_noted_may_be_of_any(home: Path) -> None:
    put_part(home, SMALL, 1000)
    found = listed()
    for name in ("tiny:Q4_K_M", "tiny:Q8_0"):
        assert (found[name].state, found[name].stray_bytes) == ("not installed", 1000)
        assert found[name].can_remove
    assert found["v2-lite-chat:Q4_K_M"].stray_bytes == 0


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"repository": 1}', "\0"])
def test_a_damaged_note_is_as_none(model_hub: FakeHub, home: Path, text: str) -> None:
    assert model_hub
    put_part(home, SMALL, 1000)
    note_download("tiny:Q4_K_M", plan(parse("tiny:Q4_K_M")))
    (note,) = (home / "cache/localds/downloads").iterdir()
    note.write_text(text)
    assert listed()["tiny:Q4_K_M"].state == "not installed"


def test_the_speed_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(download_meter.time, "monotonic", lambda: now[0])
    meter = Meter(threading.Event())
    meter.begin(10_000, 2_000)
    assert (meter.read().speed, meter.read().seconds_left) == (0.0, None)
    for _ in range(20):  # 100 bytes a second, then 50
        now[0] += 1
        meter.advance(100)
    assert meter.read().speed == pytest.approx(100)
    for _ in range(40):
        now[0] += 1
        meter.advance(50)
    assert meter.read().speed == pytest.approx(50)
    assert meter.read().seconds_left == pytest.approx((10_000 - 2_000 - 2_000 - 2_000) / 50)
    now[0] += 90  # nothing comes: it is not what it was
    assert meter.read().speed < 10
    meter.advance(-1000)
    assert meter.read().speed == 0
    assert meter.read().done == 5_000


def test_what_is_here_is_checked_first() -> None:
    meter = Meter(threading.Event())
    meter.begin(100, 40)
    meter.check("x", 40)
    meter.checked(30)
    assert (meter.read().checked, meter.read().to_check, meter.read().done) == (30, 40, 40)
    meter.checked(10)
    assert (meter.read().to_check, meter.read().done) == (0, 40)


def test_a_download_notes_itself_and_is_forgotten_when_whole(
    model_hub: FakeHub, home: Path
) -> None:
    assert model_hub
    download = Download("tiny:Q4_K_M")
    download.start()
    download._thread.join(30)
    assert (download.state, download.running) == ("done", False)
    assert not list((home / "cache/localds/downloads").iterdir())
    assert listed()["tiny:Q4_K_M"].path == find_model("tiny:Q4_K_M").path


def test_a_mistake_in_the_program_reaches_the_app(
    model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    assert model_hub
    monkeypatch.setattr("localds.catalog.pull.fetch", fail)
    download = Download("tiny:Q4_K_M")
    download.start()
    download._thread.join(30)
    with pytest.raises(ZeroDivisionError):
        _ = download.running

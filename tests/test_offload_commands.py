"""Commands on a model that is larger than its budget, as a user runs them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from offloading import budget_for
from typer.testing import CliRunner

from localds.cli import app
from localds.commands import bench_runs, inspect_placement
from localds.limits import Peaks
from localds.memory import report as memory_report

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

PEAKS = Peaks(read=20e9, int8=400e9, floats=100e9)
DISK = 2e9


@pytest.fixture(autouse=True)
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of the machine that take no seconds to measure."""
    monkeypatch.setattr(bench_runs, "measure_peaks", lambda _ram=None: PEAKS)
    monkeypatch.setattr(bench_runs, "measure_disk", lambda _paths: DISK)
    monkeypatch.setattr(memory_report, "measure_peaks", lambda _ram=None: PEAKS)
    monkeypatch.setattr(memory_report, "measure_disk", lambda _paths: DISK)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)))


def report(*words: object) -> Any:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_bench_tells_what_came_from_disk(guide_path: Path) -> None:
    ram = budget_for(guide_path, 20, 96)
    prefill, decode = report("bench", guide_path, "--ram", ram, "-p", 64, "-n", 32, "-d", 64)
    for record in (prefill, decode):
        assert 0 < record["hit_rate"] < 1
        assert record["read_bytes_per_token"] > 0
        assert record["read_gbps"] > 0
        assert record["stall_ms"] >= 0
        assert record["disk_gbs"] == pytest.approx(2)
    if decode["limit_by"] == "disk":
        limit = DISK / decode["read_bytes_per_token"]
        assert decode["limit_ts"] == pytest.approx(limit)


def test_bench_of_a_model_that_fits_reads_nothing(guide_path: Path) -> None:
    for record in report("bench", guide_path, "-p", 8, "-n", 4, "-r", 1):
        assert record["hit_rate"] is None
        assert record["read_bytes_per_token"] is None
        assert record["disk_gbs"] is None


def test_bench_prints_a_line_on_the_disk(guide_path: Path) -> None:
    ram = budget_for(guide_path, 20, 32)
    done = run("bench", guide_path, "--ram", ram, "-p", 0, "-n", 32, "-r", 1)
    assert done.exit_code == 0
    assert "20 of 80 experts at a time in memory" in done.stderr
    assert "disk 2 GB/s" in done.stdout.splitlines()[0]
    assert "of experts in memory" in done.stdout.splitlines()[-1]


def test_inspect_shows_the_placement(guide_path: Path) -> None:
    ram = budget_for(guide_path, 20, 2048)
    placement = report("inspect", guide_path, "--ram", ram)["placement"]
    assert placement["slots"] == 20
    assert placement["total_bytes"] == ram
    assert placement["pool_bytes"] == 20 * placement["slot_bytes"]
    missed = placement["expected_read_bytes_per_token"]
    assert placement["expected_tokens_per_second"] <= DISK / missed
    done = run("inspect", guide_path, "--ram", ram)
    assert "20 of 80 at a time" in done.stdout
    assert "disk 2 GB/s, memory 20 GB/s" in done.stdout
    assert "All of it fits in 8 GiB." in run("inspect", guide_path, "--ram", "8GiB").stdout


def test_inspect_below_the_floor_tells_what_would_fit(guide_path: Path) -> None:
    done = run("inspect", guide_path, "--ram", "1MiB")
    assert done.exit_code == 1
    assert "architecture" in done.stdout
    assert "the budget is 1 MiB: at least" in done.stderr
    assert done.stderr.count("\n") == 1


def test_chat_answers_the_same_from_disk(guide_path: Path) -> None:
    words = ("chat", guide_path, "-p", "How do I download a model?", "--temp", 0, "-n", 40)
    whole = run(*words)
    part = run(*words, "--ram", budget_for(guide_path, 14))
    assert part.exit_code == 0
    assert part.stdout == whole.stdout
    assert "14 of 80 experts at a time" in part.stderr
    assert inspect_placement.placement_text({"budget_bytes": None}) == ""

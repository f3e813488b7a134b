"""`localds bench`: its limits and its profile, against the file that it ran."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import gguf
import pytest
from typer.testing import CliRunner

from localds import _native
from localds.cli import app
from localds.commands import bench_runs
from localds.limits import OUTSIDE, Peaks
from localds.memory import speeds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

PEAKS = Peaks(read=20e9, int8=400e9, floats=100e9)


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks that are known, and take no second to measure."""
    monkeypatch.setattr(bench_runs, "measure_peaks", lambda _ram: PEAKS)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = _native.threads()
    yield
    _native.set_threads(threads)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def records(*words: object) -> list[dict[str, Any]]:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.usefixtures("quick_peaks")
def test_limits_follow_from_the_work_and_the_peaks(guide_path: Path) -> None:
    for record in records(guide_path, "-p", 64, "-n", 2, "-d", 8, "-r", 2, "--profile"):
        assert record["read_gbs"] == pytest.approx(20)
        assert record["int8_gops"] == pytest.approx(400)
        assert record["float_gops"] == pytest.approx(100)
        total = {
            name: sum(step[name] for step in record["profile"]["steps"])
            for name in ("bytes", "int8", "floats")
        }
        reading = total["bytes"] / PEAKS.read
        arithmetic = total["int8"] / PEAKS.int8 + total["floats"] / PEAKS.floats
        tokens = record["n_prompt"] or 1  # of the profile's unit
        assert record["limit_ts"] == pytest.approx(tokens / max(reading, arithmetic))
        assert record["limit_by"] == ("reading" if reading >= arithmetic else "arithmetic")
        if record["n_gen"]:
            assert record["limit_by"] == "reading"


@pytest.mark.usefixtures("quick_peaks")
def test_a_token_reads_its_weights_and_the_cache(guide_path: Path) -> None:
    """Counted with the gguf package: all matrices, but the experts that were not chosen."""
    reader = gguf.GGUFReader(guide_path)

    def metadata(name: str) -> int:
        return int(reader.fields[f"deepseek2.{name}"].contents())

    layers, rank = metadata("block_count"), metadata("attention.kv_lora_rank")
    used, experts = metadata("expert_used_count"), metadata("expert_count")
    cache_width = rank + metadata("rope.dimension_count")
    read = integers = floats = 0
    for tensor in reader.tensors:
        # A token looks one row up in the embedding; norms and biases are vectors. Neither counts.
        if tensor.name == "token_embd.weight" or len(tensor.shape) == 1:
            continue
        chosen, of = (used, experts) if "_exps." in tensor.name else (1, 1)
        read += int(tensor.n_bytes) * chosen // of
        elements = math.prod(map(int, tensor.shape)) * chosen // of
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            floats += elements
        else:
            integers += elements
    # Three tokens at depth 4 see 5, 6 and 7 rows, themselves included; each row makes a score and
    # adds to a context, for each head.
    rows = 6
    read += layers * rows * 2 * cache_width
    floats += layers * rows * metadata("attention.head_count") * (cache_width + rank)

    (record,) = records(guide_path, "-p", 0, "-n", 3, "-d", 4, "-r", 2, "--profile")
    steps = record["profile"]["steps"]
    assert record["profile"]["per"] == "token"
    assert sum(step["bytes"] for step in steps) == read
    assert sum(step["int8"] for step in steps) == integers
    assert sum(step["floats"] for step in steps) == floats
    (head,) = (step for step in steps if step["name"] == "head")
    (output,) = (tensor for tensor in reader.tensors if tensor.name == "output.weight")
    assert head["bytes"] == output.n_bytes
    assert head["calls"] == 1


@pytest.mark.usefixtures("quick_peaks")
def test_chunks_of_a_prompt_read_the_weights_again(guide_path: Path) -> None:
    """Only the head's calls are looked at: how many experts are read depends on the tokens."""
    for chunk, passes in ((12, 1), (4, 3)):
        (record,) = records(guide_path, "-p", 12, "-n", 0, "-r", 1, "--chunk", chunk, "--profile")
        steps = {step["name"]: step for step in record["profile"]["steps"]}
        assert record["profile"]["per"] == "run"
        assert steps["head"]["calls"] == passes
        outside_us = 1e3 * steps[OUTSIDE]["ms"]
        layers = 6
        assert record["profile"]["outside_us_per_layer"] == pytest.approx(
            outside_us / layers / passes
        )


@pytest.mark.usefixtures("quick_peaks")
def test_shares_are_of_the_whole_time(tiny_model: Path) -> None:
    for record in records(tiny_model, "-p", 8, "-n", 2, "-r", 2, "--profile"):
        steps = record["profile"]["steps"]
        assert [step["name"] for step in steps].count(OUTSIDE) == 1
        assert len({step["name"] for step in steps}) == len(steps)
        assert sum(step["share"] for step in steps) == pytest.approx(1)
        assert all(step["share"] >= 0 for step in steps)
        n_tokens = record["n_prompt"] or 1
        seconds = [n_tokens / speed for speed in record["samples_ts"]]
        assert sum(step["ms"] for step in steps) == pytest.approx(1e3 * sum(seconds) / 2)


@pytest.mark.usefixtures("quick_peaks")
def test_text(guide_path: Path) -> None:
    done = run(guide_path, "-p", 16, "-n", 2, "-d", 0, 4, "-r", 1, "-t", 1)
    assert done.exit_code == 0, done.output
    machine, blank, header, *rows = done.stdout.splitlines()
    isa = _native.isa()
    assert machine == f"1 thread, {isa}: reads 20 GB/s, multiplies 400 (int8) and 100 (float) G/s"
    assert blank == ""
    columns = ("test", "depth", "tokens/s", "limit", "of limit", "bound by")
    assert all(column in header for column in columns)
    assert [row.split()[:2] for row in rows] == [
        ["pp16", "0"],
        ["tg2", "0"],
        ["pp16", "4"],
        ["tg2", "4"],
    ]
    assert all(row.split()[-1] in ("reading", "arithmetic") for row in rows)
    assert {len(line) for line in (header, *rows)} == {len(header)}
    assert len(header) <= 80


@pytest.mark.usefixtures("quick_peaks")
def test_profile_as_text(guide_path: Path) -> None:
    words = (guide_path, "-p", 0, "-n", 2, "-r", 1)
    done = run(*words, "--profile")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("per token"))
    table = lines[start + 1 :]
    (record,) = records(*words, "--profile")
    names = [step["name"] for step in record["profile"]["steps"]]
    width = lines[start].index("calls")
    assert [line[:width].strip() for line in table] == names
    assert names[-1] == OUTSIDE
    shares = [float(word[:-1]) for line in table for word in line.split() if word.endswith("%")]
    assert len(shares) == len(names)
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert table[-1].endswith(" us a layer")


@pytest.mark.usefixtures("quick_peaks")
def test_no_profile_unless_asked(tiny_model: Path) -> None:
    words = (tiny_model, "-p", 0, "-n", 1, "-r", 1)
    (record,) = records(*words)
    assert "profile" not in record
    assert OUTSIDE not in run(*words).stdout


def test_peaks_are_measured_in_what_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    largest = 1 << 40

    def measure(nbytes: int) -> Peaks:
        asked.append(nbytes)
        if nbytes > largest:
            raise MemoryError
        return PEAKS

    monkeypatch.setattr(_native, "measure_peaks", measure)
    for free, ram, expected in (
        (None, None, 1 << 30),
        (64 << 30, None, 1 << 30),
        (4 << 30, None, 1 << 29),
        (64 << 30, "2GiB", 1 << 28),
        (0, None, 1 << 26),
    ):
        monkeypatch.setattr(speeds, "available_memory", lambda free=free: free)
        asked.clear()
        assert speeds.measure_peaks(ram) == PEAKS
        assert asked == [expected]

    monkeypatch.setattr(speeds, "available_memory", lambda: 4 << 30)
    largest = 1 << 27
    asked.clear()
    speeds.measure_peaks()
    assert asked == [1 << 29, 1 << 28, 1 << 27]
    largest = 1
    with pytest.raises(MemoryError):
        speeds.measure_peaks()


def test_no_memory_for_the_peaks_is_one_message(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_nbytes: int) -> Peaks:
        raise MemoryError

    monkeypatch.setattr(_native, "measure_peaks", measure)
    done = run(tiny_model)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("localds: error: not enough memory")


def test_a_mistake_is_told_before_anything_is_measured(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_nbytes: int) -> Peaks:
        raise AssertionError

    monkeypatch.setattr(_native, "measure_peaks", measure)
    for words in (("-d", 10**9), ("--cache-type", "f8")):
        done = run(tiny_model, *words)
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1

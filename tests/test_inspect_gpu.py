"""`localds inspect` of a model on a GPU, for which MLX's CPU device stands in."""

from __future__ import annotations

import json
from datetime import date
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from localds import on_gpu
from localds.cli import app
from localds.memory.speeds import Speeds

pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

SPEEDS = Speeds(20e9, 400e9, 2e9, 10e9, 100e9, "MLX's CPU device", date(2026, 11, 26))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDS_GPU", "cpu")
    monkeypatch.setattr(on_gpu, "known_speeds", lambda *_: None)
    monkeypatch.setattr(on_gpu, "speeds_for", measured)


def measured(_gpu: Any, _paths: Any, on_note: Any) -> Speeds:
    on_note("measuring")
    return SPEEDS


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def report(*words: object) -> Any:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_all_of_a_model_on_the_gpu(guide_path: Path) -> None:
    told = report(guide_path)
    assert told["device"] == "gpu"
    gpu = told["gpu"]
    assert gpu["name"] == "MLX's CPU device"
    assert gpu["resident"]
    assert gpu["slots"] == [16] * 5
    assert gpu["expected_hit_rate"] == 1
    assert gpu["expected_tokens_per_second"] is None  # nothing was measured for it
    assert told["placement"]["resident"]
    done = run(guide_path)
    assert "All of it fits." in done.stdout
    assert "measuring" not in done.stderr


def test_experts_in_ram_and_on_disk_beside_the_gpu(guide_path: Path) -> None:
    whole = report(guide_path, "--cpu-moe")
    assert whole["gpu"]["slots"] == [0] * 5
    assert whole["placement"]["resident"]
    assert whole["placement"]["total_bytes"] >= whole["parts"]["routed experts"]
    assert whole["gpu"]["expected_tokens_per_second"] > 0
    done = run(guide_path, "-ncmoe", 3)
    assert done.stderr.startswith("localds: measuring")
    assert "48 of 80" in done.stdout
    assert "In RAM beside it:" in done.stdout
    assert "computed by the CPU" in done.stdout

    fixed = whole["placement"]["total_bytes"] - whole["parts"]["routed experts"]
    ram = fixed + 3 * whole["parts"]["routed experts"] // 4
    part = report(guide_path, "--cpu-moe", "--ram", ram)["placement"]
    assert not part["resident"]
    assert part["trunk_bytes"] == part["cache_bytes"] == 0
    assert part["total_bytes"] <= ram
    text = run(guide_path, "--cpu-moe", "--ram", ram).stdout
    assert "with experts on disk" in text
    assert f"{part['slots']} of 80 at a time" in text


def test_as_many_experts_as_fit(guide_path: Path) -> None:
    none = report(guide_path, "--cpu-moe")["gpu"]
    vram = none["total_bytes"] + 40 * report(guide_path)["gpu"]["pool_bytes"] // 80
    gpu = report(guide_path, "--vram", vram)["gpu"]
    assert gpu["budget_bytes"] == vram
    assert 30 <= sum(gpu["slots"]) <= 40
    assert gpu["total_bytes"] <= vram


def test_unified_memory(guide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDS_GPU", "cpu-unified")
    done = run(guide_path, "--n-cpu-moe", 3)
    assert done.exit_code == 0
    assert "brought there when they are needed" in done.stdout
    assert "12 of 32 at a time" in done.stdout


def test_what_cannot_be(guide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (("--vram", "1MiB"), "of GPU memory"),
        (("--vram", "9TiB"), "more than MLX's CPU device has"),
        (("--vram", "much"), "size 'much' is not understood"),
        (("--device", "cpu", "--vram", "1GiB"), "vram is a limit on GPU memory"),
        (("--device", "cpu", "-cmoe"), "cpu_moe keeps experts off the GPU"),
        (("--cpu-moe", "-ncmoe", 2), "give one of them"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
    ):
        done = run(guide_path, *words)
        assert done.exit_code == 1
        assert done.stderr.startswith("localds: error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    monkeypatch.setenv("LOCALDS_GPU", "none")
    assert "is hidden by LOCALDS_GPU=none" in run(guide_path, "--device", "gpu").stderr
    assert report(guide_path)["device"] == "cpu"


def test_auto_is_the_cpu_where_the_gpu_is_too_small(
    guide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from localds.ops import mlx_device

    small = replace(mlx_device.find_gpu(), total_bytes=600 << 20, free_bytes=600 << 20)
    monkeypatch.setattr(on_gpu, "find_gpu", lambda: small)
    done = run(guide_path)
    assert done.exit_code == 0
    assert done.stderr.startswith("localds: computing on the CPU: the model needs")
    assert "MLX's CPU device, in" not in done.stdout
    assert run(guide_path, "--device", "gpu").exit_code == 1

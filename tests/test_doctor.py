"""`localds doctor`: as a user runs it, and with other machines faked."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from datetime import date
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from localds import _native
from localds.cli import app
from localds.commands import doctor_report, doctor_speeds
from localds.commands.doctor_report import Report
from localds.memory.machine import total_memory
from localds.memory.speeds import Speeds
from localds.ops.mlx_device import Gpu, NoGpuError
from localds.ops.nvidia import Driver

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

LOCALDS = [sys.executable, "-P", "-m", "localds", "doctor"]
CARD = Gpu("RTX 4090", "cuda", 24 << 30, 22 << 30, unified=False)
SPEEDS = Speeds(50e9, 800e9, None, 24.5e9, 912e9, "RTX 4090", date(2026, 5, 4))
NAME = re.compile(r"^  (\S+(?: \S+)*?)(?:  +|$)")


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALDS_GPU", raising=False)


def rows(text: str) -> dict[str, dict[str, str]]:
    """The values of the printed sections, by section and name."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            section = line
        elif match := NAME.match(line):
            found.setdefault(section, {})[match[1]] = line[match.end() :]
    return found


# ---- as a user runs it ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LOCALDS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_CACHE": str(folder / "not" / "yet")} | variables,
        # A test run in the background of a shell inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_for_people(folder: Path) -> None:
    running = start(folder, LOCALDS_GPU="none")
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert err.splitlines() == [
        "looking at the machine ...",
        "measuring memory, disk and GPU: some seconds ...",
    ]
    printed = rows(out)
    assert list(printed) == ["Processor", "Memory", "GPU", "Folders", "Speeds"]
    assert printed["Processor"]["kernels"].startswith(f"{_native.isa()}, of ")
    assert printed["GPU"]["none"] == "the GPU is hidden by LOCALDS_GPU=none; unset it"
    assert re.fullmatch(r"[\d.]+ GB/s", printed["Speeds"]["memory"])
    assert re.fullmatch(r"[\d.]+ GB/s", printed["Speeds"]["disk"])
    assert "GPU memory" not in printed["Speeds"]
    assert list(folder.iterdir()) == []


def test_for_programs_with_a_stand_in(folder: Path) -> None:
    pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
    running = start(folder, "--json", LOCALDS_GPU="cpu-unified")
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    found = json.loads(out)
    assert list(found) == [*(field.name for field in fields(Report)), "speeds"]
    assert found["memory"]["total_bytes"] == total_memory()
    assert found["gpu"]["kind"] == "cpu"
    assert found["gpu"]["unified"] is True
    assert found["no_gpu"] is None
    assert found["failed_kernels"] is None
    assert found["mlx"]["packages"][0].startswith("mlx ")
    assert [entry["purpose"] for entry in found["folders"]] == [
        "settings",
        "chats",
        "cache",
        "models",
    ]
    assert found["folders"][3]["path"] == str(folder / "not" / "yet")
    speeds = found["speeds"]
    assert date.fromisoformat(speeds.pop("measured")) <= date.today()
    assert speeds.pop("gpu") == found["gpu"]["name"]
    assert all(speed > 1e6 for speed in speeds.values())
    assert list(folder.iterdir()) == []


def test_ctrl_c_leaves_no_file(folder: Path) -> None:
    running = start(folder, LOCALDS_GPU="none")
    deadline = time.monotonic() + 60
    while not list(folder.iterdir()):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, out + err
    assert list(folder.iterdir()) == []


def test_a_wrong_variable_is_one_message(folder: Path) -> None:
    running = start(folder, LOCALDS_GPU="yes")
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith("localds: error: LOCALDS_GPU='yes' is not one of")


# ---- other machines ----


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without GPU, MLX and driver, measured at once."""
    monkeypatch.setattr(doctor_speeds, "measure", lambda *_: SPEEDS)
    monkeypatch.setattr(doctor_report, "nvidia_driver", lambda: None)
    monkeypatch.setattr(doctor_report, "clash", lambda: None)
    monkeypatch.setattr(doctor_report, "find_spec", lambda _: None)
    monkeypatch.setattr(doctor_report, "find_gpu", no_gpu("MLX is not installed; pip install it"))
    return monkeypatch


def no_gpu(reason: str) -> object:
    def find() -> Gpu:
        raise NoGpuError(reason)

    return find


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *words])


def problems(result: Result) -> list[str]:
    _, _, found = result.stdout.partition("\nProblems\n")
    return [line.strip() for line in found.splitlines()]


def test_without_a_gpu_all_is_well(machine: pytest.MonkeyPatch) -> None:
    del machine
    result = run()
    assert result.exit_code == 0
    assert problems(result) == []
    printed = rows(result.stdout)
    assert printed["GPU"] == {
        "none": "MLX is not installed; pip install it",
        "MLX": "not installed",
    }
    assert printed["Speeds"] == {
        "memory": "50 GB/s",
        "processor": "800 thousand million multiply-adds (int8) a second",
        "disk": "not measured: needs 1 GiB that may be written",
        "memory to GPU": "24.5 GB/s",
        "GPU memory": "912 GB/s",
    }


def test_a_card_without_mlx_is_a_problem(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor_report, "nvidia_driver", lambda: Driver((13, 1), ("RTX 4090",)))
    result = run()
    assert result.exit_code == 1
    assert problems(result) == ["the GPU is not used: MLX is not installed; pip install it"]
    printed = rows(result.stdout)
    assert printed["GPU"]["driver"] == "NVIDIA's for CUDA 13.1, lists RTX 4090"
    machine.setenv("LOCALDS_GPU", "none")  # as wanted
    assert run().exit_code == 0


def test_a_driver_without_a_card_is_none(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor_report, "nvidia_driver", lambda: Driver((13, 1), ()))
    assert run().exit_code == 0


def test_mlx_that_cannot_be_loaded_is_a_problem(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor_report, "find_spec", lambda _: True)
    machine.setattr(doctor_report, "check_mlx", no_gpu("broken; mend it"))
    machine.setattr(doctor_report, "find_gpu", no_gpu("broken; mend it"))
    result = run()
    assert result.exit_code == 1
    assert problems(result) == ["the GPU is not used: broken; mend it"]
    assert rows(result.stdout)["GPU"]["MLX"].endswith("cannot be loaded")


def test_two_builds_are_one_problem(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(doctor_report, "clash", lambda: "both; keep one: pip uninstall")
    machine.setattr(doctor_report, "nvidia_driver", lambda: Driver((13, 1), ("RTX 4090",)))
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"] == ["both; keep one: pip uninstall"]


@pytest.mark.parametrize(
    ("failed", "status", "kernels"),
    [
        ({}, 0, "all of localds's kernels work"),
        (
            {"Q4_K": "wrong results of gated"},
            1,
            "1 do not work; MLX's operations take their place:",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["cuda", "metal"])
def test_kernels_are_tried(
    machine: pytest.MonkeyPatch, kind: str, failed: dict[str, str], status: int, kernels: str
) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
    name = f"localds.ops.mlx.{kind}.proof"
    proof = ModuleType(name)
    proof.failures = lambda: failed  # type: ignore[attr-defined]
    machine.setitem(sys.modules, name, proof)
    machine.setattr(mx, "gpu", mx.cpu)
    machine.setattr(mx, "device_info", lambda _: {"architecture": "sm_89"})
    machine.setattr(doctor_report, "find_gpu", lambda: replace(CARD, kind=kind))
    result = run()
    assert result.exit_code == status, result.output
    printed = rows(result.stdout)
    assert printed["GPU"]["name"] == f"RTX 4090 ({kind}, sm_89)"
    assert printed["GPU"]["memory"] == "24 GiB; 22 GiB free"
    assert printed["GPU"]["kernels"] == kernels
    for name, reason in failed.items():
        assert f"    {name}: {reason}" in result.stdout.splitlines()
    assert len(problems(result)) == len(failed)


# ---- the disk ----


def test_the_sample_is_whole_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measure(gpu: Gpu | None, paths: list[Path]) -> Speeds:
        assert gpu is CARD
        seen.extend((path.parent, path.stat().st_size) for path in paths)
        raise OSError("the disk fails")

    monkeypatch.setattr(doctor_speeds, "refresh_speeds", measure)
    with pytest.raises(OSError, match="the disk fails"):
        doctor_speeds.measure(CARD, tmp_path)
    assert seen == [(tmp_path, 256 << 20)]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(tmp_path)

    class Full:
        f_frsize = found.f_frsize
        f_bavail = (1 << 30) // found.f_frsize - 1

    monkeypatch.setattr(doctor_speeds.os, "statvfs", lambda _: Full)
    monkeypatch.setattr(doctor_speeds, "refresh_speeds", lambda *given: given)
    assert doctor_speeds.measure(CARD, tmp_path) == (CARD,)

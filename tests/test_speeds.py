"""The machine's speeds: what is measured, and what is kept of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from localds import _native
from localds.limits import Peaks
from localds.memory import gpu_speeds, speeds
from localds.memory.speeds import Speeds, known_speeds, measure_speeds, speeds_for
from localds.ops.mlx_device import Gpu
from localds.settings import cache_folder

if TYPE_CHECKING:
    from pathlib import Path

GPU = Gpu("a card", "cuda", 8 << 30, 8 << 30, unified=False)
DISK, UPLOAD, DEVICE = 2e9, 20e9, 900e9


class Measured:
    """Stands in for what takes seconds; `count` says how often which was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = {"peaks": 0, "disk": 0, "gpu": 0}
        monkeypatch.setattr(speeds, "measure_peaks", self.peaks)
        monkeypatch.setattr(speeds, "measure_disk", self.disk)
        monkeypatch.setattr(gpu_speeds, "measure_gpu", self.gpu)

    def peaks(self) -> Peaks:
        self.count["peaks"] += 1
        return Peaks(40e9, 800e9, 100e9)

    def disk(self, _paths: Any) -> float:
        self.count["disk"] += 1
        return DISK

    def gpu(self, _gpu: Gpu) -> tuple[float, float]:
        self.count["gpu"] += 1
        return UPLOAD, DEVICE


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"weights")
    return tmp_path / "model.gguf"


def kept() -> Any:
    return json.loads((cache_folder() / "speeds.json").read_text())


def rewrite(change: Any) -> None:
    """Change what is kept of the only machine."""
    whole = kept()
    (machine,) = whole["machines"].values()
    change(machine)
    (cache_folder() / "speeds.json").write_text(json.dumps(whole))


def test_all_is_measured_once(measured: Measured, file: Path) -> None:
    notes: list[str] = []
    assert known_speeds(GPU, [file]) is None
    first = speeds_for(GPU, [file], notes.append)
    assert first == Speeds(40e9, 800e9, DISK, UPLOAD, DEVICE, "a card", date.today())
    assert len(notes) == 1
    assert "once" in notes[0]
    assert speeds_for(GPU, [file], notes.append) == known_speeds(GPU, [file]) == first
    assert measured.count == {"peaks": 1, "disk": 1, "gpu": 1}
    assert len(notes) == 1


def test_each_gpu_has_its_own(measured: Measured, file: Path) -> None:
    speeds_for(GPU, [file])
    other = replace(GPU, name="another card")
    assert known_speeds(other) is None
    assert known_speeds(None) is None
    without = speeds_for(None, [file])
    assert without.upload_bytes_per_second is without.device_bytes_per_second is None
    assert measured.count == {"peaks": 2, "disk": 2, "gpu": 1}
    assert known_speeds(GPU) is not None


@pytest.mark.usefixtures("measured")
def test_another_number_of_threads_is_another_machine(file: Path) -> None:
    speeds_for(GPU, [file])
    before = _native.threads()
    try:
        _native.set_threads(before + 1)
        assert known_speeds(GPU) is None
    finally:
        _native.set_threads(before)
    assert known_speeds(GPU) is not None


def test_another_disk_is_measured_alone(measured: Measured, file: Path) -> None:
    notes: list[str] = []
    whole = speeds_for(GPU, [file])
    without = known_speeds(GPU)
    assert without == replace(whole, disk_bytes_per_second=None)
    rewrite(lambda machine: machine.update(disk=[-1]))
    assert known_speeds(GPU, [file]) == without
    assert speeds_for(GPU, [file], notes.append) == whole == known_speeds(GPU, [file])
    assert measured.count == {"peaks": 1, "disk": 2, "gpu": 1}
    assert notes == []


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("days", "known"), [(0, True), (90, True), (91, False), (-1, False)])
def test_speeds_are_kept_for_90_days(file: Path, days: int, known: bool) -> None:
    speeds_for(GPU, [file])
    made = (date.today() - timedelta(days=days)).isoformat()
    rewrite(lambda machine: machine["speeds"].update(measured=made))
    assert (known_speeds(GPU, [file]) is not None) is known


def damage() -> list[Any]:
    return [
        lambda machine: machine.clear(),
        lambda machine: machine.update(speeds=[]),
        lambda machine: machine["speeds"].pop("gpu"),
        lambda machine: machine["speeds"].update(more=1),
        lambda machine: machine["speeds"].update(measured="soon"),
        lambda machine: machine["speeds"].update(memory_bytes_per_second="fast"),
        lambda machine: machine["speeds"].update(memory_bytes_per_second=None),
        lambda machine: machine["speeds"].update(upload_bytes_per_second=0),
        lambda machine: machine["speeds"].update(disk_bytes_per_second=-1.0),
        lambda machine: machine["speeds"].update(device_bytes_per_second=float("nan")),
        lambda machine: machine["speeds"].update(device_bytes_per_second=[1]),
    ]


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("change", damage())
def test_what_is_damaged_is_measured_again(file: Path, change: Any) -> None:
    whole = speeds_for(GPU, [file])
    rewrite(change)
    assert known_speeds(GPU, [file]) is None
    assert speeds_for(GPU, [file]) == whole == known_speeds(GPU, [file])


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "machines": []}', "\0", "{"]
)
def test_a_damaged_file_counts_as_absent(file: Path, text: str) -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / "speeds.json").write_text(text)
    assert known_speeds(GPU) is None
    speeds_for(GPU, [file])
    assert known_speeds(GPU) is not None


@pytest.mark.usefixtures("measured")
def test_speeds_of_another_version_are_not_read(file: Path) -> None:
    speeds_for(GPU, [file])
    whole = kept()
    whole["version"] += 1
    (cache_folder() / "speeds.json").write_text(json.dumps(whole))
    assert known_speeds(GPU) is None


@pytest.mark.usefixtures("measured")
def test_only_the_last_machines_are_kept(file: Path) -> None:
    for number in range(20):
        speeds_for(replace(GPU, name=f"card {number}"), [file])
    assert len(kept()["machines"]) == 16
    assert known_speeds(replace(GPU, name="card 3")) is None
    assert known_speeds(replace(GPU, name="card 19")) is not None


def test_a_folder_that_cannot_be_written_does_not_matter(
    measured: Measured, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert speeds_for(GPU, [file]).gpu == "a card"
    assert measured.count["peaks"] == 1
    speeds_for(GPU, [file])
    assert measured.count["peaks"] == 2


def test_without_a_file_the_disk_is_not_measured(measured: Measured) -> None:
    assert measure_speeds(None).disk_bytes_per_second is None
    assert measured.count == {"peaks": 1, "disk": 0, "gpu": 0}


@pytest.mark.usefixtures("measured")
def test_what_is_kept_has_no_other_figures(file: Path) -> None:
    whole = speeds_for(GPU, [file])
    (machine,) = kept()["machines"].values()
    assert machine["speeds"] == asdict(whole) | {"measured": whole.measured.isoformat()}


def test_a_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
    from localds.ops.mlx_device import find_gpu

    monkeypatch.setenv("LOCALDS_GPU", "cpu")
    monkeypatch.setattr(gpu_speeds, "_SECONDS", 0.05)
    upload, device = gpu_speeds.measure_gpu(find_gpu())
    # It is memory on both sides: slower than a processor's cache, faster than a disk of old.
    assert 1e7 < upload < 1e12
    assert 1e7 < device < 1e12

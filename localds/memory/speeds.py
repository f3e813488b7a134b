"""How fast this machine moves and multiplies: measured once, and kept."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localds import _native
from localds.limits import Peaks
from localds.memory.disk import measure_disk
from localds.memory.machine import available_memory, processor_name
from localds.settings import cache_folder, write_whole
from localds.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from localds.ops.mlx_device import Gpu

# Enough that no cache of a processor holds it.
_MOST_READ = 1 << 30
_LEAST_READ = 1 << 26

_VERSION = 1
_KEPT_FOR = timedelta(days=90)
_MOST_KEPT = 16  # a folder may serve many machines


@dataclass(frozen=True, slots=True)
class Speeds:
    """What the machine does at best, a second; None where it was not measured.

    `multiply_adds_per_second` are the CPU's, of 8-bit integers. `upload_bytes_per_second` is from
    RAM to the GPU `gpu`, `device_bytes_per_second` from the GPU's memory.
    """

    memory_bytes_per_second: float
    multiply_adds_per_second: float
    disk_bytes_per_second: float | None
    upload_bytes_per_second: float | None
    device_bytes_per_second: float | None
    gpu: str | None
    measured: date


def speeds_for(
    gpu: Gpu | None, paths: Sequence[Path], on_note: Callable[[str], None] | None = None
) -> Speeds:
    """The machine's speeds, with the disk's that the files `paths` lie on: known or measured now.

    Measuring takes some seconds, once; `on_note` is told before. Raises `ReadError`, an `OSError`,
    where the disk fails.
    """
    known = known_speeds(gpu, paths)
    if known is not None and known.disk_bytes_per_second is not None:
        return known
    if known is not None:
        speeds = replace(known, disk_bytes_per_second=measure_disk(paths))
    else:
        if on_note:
            on_note("measuring the speeds of memory, disk and GPU, which is done once")
        speeds = measure_speeds(gpu, paths)
    _keep(speeds, paths)
    return speeds


def known_speeds(gpu: Gpu | None, paths: Sequence[Path] = ()) -> Speeds | None:
    """Speeds measured on this machine in the last 90 days, None where there are none.

    That of the disk is told if the files `paths` lie on the one that was measured.
    """
    kept = _read()
    found = kept.get(_machine(gpu.name if gpu else None))
    try:
        speeds = None if found is None else _from_json(found["speeds"])
        disk = None if found is None else found["disk"]
    except (ValueError, TypeError, KeyError):
        return None
    if speeds is None or not timedelta() <= date.today() - speeds.measured <= _KEPT_FOR:
        return None
    same_disk = bool(paths) and disk == _disk(paths)
    return speeds if same_disk else replace(speeds, disk_bytes_per_second=None)


def measure_speeds(gpu: Gpu | None, paths: Sequence[Path] = ()) -> Speeds:
    """Measure for 3 s: memory and CPU, the disk that `paths` lie on, and `gpu`.

    Raises `ReadError`, an `OSError`, where the disk fails.
    """
    peaks = measure_peaks()
    upload = device = None
    if gpu is not None:
        from localds.memory.gpu_speeds import measure_gpu

        upload, device = measure_gpu(gpu)
    return Speeds(
        memory_bytes_per_second=peaks.read,
        multiply_adds_per_second=peaks.int8,
        disk_bytes_per_second=measure_disk(paths) if paths else None,
        upload_bytes_per_second=upload,
        device_bytes_per_second=device,
        gpu=gpu.name if gpu else None,
        measured=date.today(),
    )


def refresh_speeds(gpu: Gpu | None, paths: Sequence[Path] = ()) -> Speeds:
    """`measure_speeds`, kept for `known_speeds`."""
    speeds = measure_speeds(gpu, paths)
    _keep(speeds, paths)
    return speeds


def measure_peaks(ram: str | None = None) -> Peaks:
    """What the machine does at best now, on as many threads as `_native.threads()`.

    Takes up to 1 GiB for a moment, and no more than an eighth of what is free or of `ram`.
    """
    rooms = [available_memory(), None if ram is None else parse_size(ram)]
    nbytes = min([_MOST_READ, *(room // 8 for room in rooms if room is not None)])
    nbytes = max(nbytes, _LEAST_READ)
    while True:
        try:
            peaks = _native.measure_peaks(nbytes)
        except MemoryError:
            # A limit that nothing tells of, such as one on the address space.
            if nbytes <= _LEAST_READ:
                raise
            nbytes //= 2
        else:
            return Peaks(peaks.read, peaks.int8, peaks.floats)


def _keep(speeds: Speeds, paths: Sequence[Path]) -> None:
    """Write the speeds down; where that cannot be, they are measured again next time."""
    machine = _machine(speeds.gpu)
    kept = _read()
    kept.pop(machine, None)
    kept[machine] = {
        "speeds": asdict(speeds) | {"measured": speeds.measured.isoformat()},
        "disk": _disk(paths),
    }
    newest = dict(list(kept.items())[-_MOST_KEPT:])
    try:
        write_whole(_file(), json.dumps({"version": _VERSION, "machines": newest}, indent=1))
    except OSError:
        return


def _read() -> dict[str, Any]:
    """What is kept, by machine; nothing where the file is absent or damaged."""
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
        machines = kept["machines"] if kept["version"] == _VERSION else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return machines if isinstance(machines, dict) else {}


def _from_json(kept: dict[str, Any]) -> Speeds:
    """Raises `ValueError`, `TypeError` or `KeyError` for what no speeds are."""
    speeds = Speeds(**kept | {"measured": date.fromisoformat(kept["measured"])})
    required = {speeds.memory_bytes_per_second, speeds.multiply_adds_per_second}
    optional = {
        speeds.disk_bytes_per_second,
        speeds.upload_bytes_per_second,
        speeds.device_bytes_per_second,
    }
    for speed in required | (optional - {None}):
        if not isinstance(speed, int | float) or not isfinite(speed) or speed <= 0:
            raise ValueError(f"{speed!r} is no speed")
    return speeds


def _file() -> Path:
    return cache_folder() / "speeds.json"


def _machine(gpu: str | None) -> str:
    """Tells machines apart by what is measured: the processor, the threads, and the GPU."""
    return (
        f"{processor_name() or platform.machine()}, {_native.threads()} threads, {gpu or 'no GPU'}"
    )


def _disk(paths: Sequence[Path]) -> list[int]:
    """The devices that files lie on."""
    return sorted({path.stat().st_dev for path in paths})

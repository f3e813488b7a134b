"""What `localds doctor` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localds.commands.doctor_speeds import LEAST_FREE
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localds.commands.doctor_report import Mlx, Report
    from localds.memory.speeds import Speeds


def report_lines(report: Report) -> Iterator[str]:
    """All but speeds and problems."""
    cpu, memory = report.cpu, report.memory
    yield f"localds {report.localds}, Python {report.python}, {report.system}"
    yield from ("", "Processor")
    yield _row("name", cpu.name)
    cores = "unknown" if cpu.cores is None else str(cpu.cores)
    yield _row("cores", f"{cores}; {cpu.threads} threads are used")
    yield _row("kernels", f"{cpu.isa}, of {', '.join(cpu.isas)}")
    yield from ("", "Memory")
    yield _row("total", _size(memory.total_bytes))
    yield _row("free", _size(memory.free_bytes))
    yield _row("for models", f"{_size(memory.budget_bytes)}, unless --ram says otherwise")
    yield from ("", "GPU", *_gpu_lines(report))
    yield from ("", "Folders")
    for folder in report.folders:
        yield _row(folder.purpose, f"{folder.path} ({format_size(folder.free_bytes)} free)")


def speed_lines(speeds: Speeds) -> Iterator[str]:
    """What was measured."""
    yield from ("", "Speeds")
    yield _row("memory", _gbs(speeds.memory_bytes_per_second))
    billions = _figure(speeds.multiply_adds_per_second / 1e9)
    yield _row("processor", f"{billions} thousand million multiply-adds (int8) a second")
    disk = speeds.disk_bytes_per_second
    missing = f"not measured: needs {format_size(LEAST_FREE)} that may be written"
    yield _row("disk", missing if disk is None else _gbs(disk))
    if speeds.upload_bytes_per_second is not None:
        yield _row("memory to GPU", _gbs(speeds.upload_bytes_per_second))
    if speeds.device_bytes_per_second is not None:
        yield _row("GPU memory", _gbs(speeds.device_bytes_per_second))


def problem_lines(report: Report) -> Iterator[str]:
    """What to mend, and how."""
    if report.problems:
        yield from ("", "Problems", *(f"  {problem}" for problem in report.problems))


def _gpu_lines(report: Report) -> Iterator[str]:
    gpu = report.gpu
    if gpu is None:
        yield _row("none", str(report.no_gpu))
    else:
        yield _row("name", f"{gpu.name} ({gpu.kind}, {report.architecture})")
        shared = ", the machine's own" if gpu.unified else ""
        free = format_size(gpu.free_bytes)
        yield _row("memory", f"{format_size(gpu.total_bytes)}{shared}; {free} free")
        yield from _kernel_lines(report)
    if driver := report.nvidia_driver:
        major, minor = driver.cuda
        devices = ", ".join(driver.devices) or "no card"
        yield _row("driver", f"NVIDIA's for CUDA {major}.{minor}, lists {devices}")
    yield _row("MLX", _mlx_text(report.mlx))


def _kernel_lines(report: Report) -> Iterator[str]:
    failed = report.failed_kernels
    if failed is None:
        yield _row("kernels", "MLX's own")
    elif not failed:
        yield _row("kernels", "all of localds's kernels work")
    else:
        yield _row("kernels", f"{len(failed)} do not work; MLX's operations take their place:")
        for name, reason in failed.items():
            yield f"    {name}: {reason}"


def _mlx_text(mlx: Mlx | None) -> str:
    if mlx is None:
        return "not installed"
    packages = ", ".join(mlx.packages) or "of an unknown version"
    return (
        f"{packages}; {'cannot be loaded' if mlx.build is None else f'the build for {mlx.build}'}"
    )


def _row(name: str, value: str) -> str:
    return f"  {name:<15}{value}"


def _size(size: int | None) -> str:
    return "unknown" if size is None else format_size(size)


def _gbs(speed: float) -> str:
    return f"{_figure(speed / 1e9)} GB/s"


def _figure(value: float) -> str:
    """Three digits, and no exponent for large values."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

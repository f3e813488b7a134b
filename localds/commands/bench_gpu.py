"""What `localds bench` measures otherwise of a model on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.memory.gpu_speed import expected_gpu_speed

if TYPE_CHECKING:
    from localds.model import Model


@dataclass(frozen=True, slots=True)
class GpuPeaks:
    """A GPU's name, and gigabytes a second from its memory and to it from RAM."""

    gpu: str
    gpu_gbs: float | None
    upload_gbs: float | None


def gpu_peaks(model: Model) -> GpuPeaks | None:
    """What the model's GPU does at best, measured unless it is known; None for a model on the CPU.

    Raises `ReadError`, an `OSError`, where the disk fails.
    """
    if model.on_gpu is None:
        return None
    speeds = model.on_gpu.measured_speeds()
    device, upload = speeds.device_bytes_per_second, speeds.upload_bytes_per_second
    return GpuPeaks(
        model.on_gpu.gpu.name,
        None if device is None else device / 1e9,
        None if upload is None else upload / 1e9,
    )


def decode_limit(model: Model) -> float | None:
    """Tokens a second at most, by the weights that must be read; None where a speed is not known.

    Experts are counted as if all were used alike.
    """
    gpu = model.on_gpu
    if gpu is None:
        return None
    return expected_gpu_speed(gpu.placement, model.placement, model.geometry, gpu.measured_speeds())


def hits_between(before: tuple[int, int], after: tuple[int, int]) -> float | None:
    """The share of experts that lay on the GPU when they were used; None where nothing counts."""
    uses = after[1] - before[1]
    return (after[0] - before[0]) / uses if uses else None

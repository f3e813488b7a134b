"""How fast a model will run of which a part lies on a GPU, from the machine's speeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from localds.memory.gpu_plan import GpuPlacement
    from localds.memory.gpu_sizes import DeviceSizes
    from localds.memory.placement import Placement
    from localds.memory.speeds import Speeds
    from localds.models.geometry import Geometry

_ROUNDED_TO = 8


def stream_from(
    sizes: DeviceSizes,
    slots: Sequence[int],
    used: int,
    chunk: int,
    speeds: Speeds | None,
    disk_share: float,
) -> int | None:
    """Tokens at once from which bringing all missing experts to the GPU beats the CPU.

    None if that is not so for as many as `chunk`, or the speeds are not known. With E experts in a
    layer, k of them used by a token and m missing on the GPU, all alike, n tokens choose about
    m * (1 - (1 - k / E)^n) of the missing ones, in n * k * m / E pairs. The CPU takes as long as
    reading these experts or their multiply-adds, whichever is longer; the GPU, as bringing all m.
    A share of the bytes, `disk_share`, comes from disk for either.
    """
    if speeds is None or speeds.upload_bytes_per_second is None:
        return None
    missing = [sizes.experts - count for count in slots]
    nbytes = sum(m * b for m, b in zip(missing, sizes.expert_file_bytes, strict=True))
    products = sum(m * a for m, a in zip(missing, sizes.multiply_adds, strict=True))
    per_token = used / sizes.experts
    disk = disk_share / (speeds.disk_bytes_per_second or float("inf"))
    upload = nbytes / speeds.upload_bytes_per_second
    for n in range(1, chunk + 1):
        read = nbytes * (1 - (1 - per_token) ** n)
        arithmetic = n * per_token * products / speeds.multiply_adds_per_second
        cpu = max(read / speeds.memory_bytes_per_second, arithmetic, read * disk)
        if max(upload, read * disk) < cpu:
            return min(-(-n // _ROUNDED_TO) * _ROUNDED_TO, chunk)
    return None


def device_hits(placement: GpuPlacement, usage: NDArray[np.uint32] | None = None) -> float:
    """The share of experts that will be on the GPU when they are needed, from 0 to 1.

    `usage` uint32 [layers, experts] are uses in earlier runs; without them all experts are alike.
    """
    if placement.resident:
        return 1.0
    if usage is None or not usage.any():
        return sum(placement.slots) / (len(placement.slots) * placement.experts)
    most = _sorted(usage)
    hits = sum(sum(row[:count]) for row, count in zip(most, placement.slots, strict=True))
    return float(hits / usage.sum(dtype=float))


def expected_gpu_speed(
    placement: GpuPlacement,
    host: Placement,
    geometry: Geometry,
    speeds: Speeds,
    usage: NDArray[np.uint32] | None = None,
) -> float | None:
    """Tokens a second when decoding, at most; None where a speed that counts is not known.

    The GPU reads the trunk and then the experts it has, the CPU the others at the same time. What
    the host lacks comes from disk before. Memory that GPU and CPU share is read by the GPU alone,
    once what is missing was copied there.
    """
    if speeds.device_bytes_per_second is None:
        return None
    device = 1 / speeds.device_bytes_per_second
    hits = device_hits(placement, usage)
    experts = geometry.experts_used * sum(placement.expert_bytes)
    missed = (1 - hits) * experts
    trunk = placement.active_trunk * device
    if not missed:
        return 1 / (trunk + experts * device)
    from_disk = missed * (1 - _host_hits(placement, host, usage))
    if from_disk and speeds.disk_bytes_per_second is None:
        return None
    disk = from_disk / (speeds.disk_bytes_per_second or float("inf"))
    if placement.unified:
        upload = missed / (speeds.upload_bytes_per_second or speeds.memory_bytes_per_second)
        return 1 / (trunk + experts * device + upload + disk)
    beside = max(hits * experts * device, missed / speeds.memory_bytes_per_second)
    return 1 / (trunk + beside + disk)


def _host_hits(placement: GpuPlacement, host: Placement, usage: NDArray[np.uint32] | None) -> float:
    """The share of experts missing on the GPU that the host has in memory."""
    if host.resident:
        return 1.0
    if usage is None or not usage.any():
        missing = sum(placement.experts - count for count in placement.slots)
        return min(host.main / missing, 1.0)
    rest = [row[count:] for row, count in zip(_sorted(usage), placement.slots, strict=True)]
    uses = sorted((use for row in rest for use in row), reverse=True)
    return sum(uses[: host.main]) / max(sum(uses), 1)


def _sorted(usage: NDArray[np.uint32]) -> list[list[int]]:
    """Each layer's uses, the most first."""
    return [sorted(row, reverse=True) for row in usage.tolist()]

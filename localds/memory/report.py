"""Figures on what lies where, and how fast that will be, for people and programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localds.memory.disk import measure_disk
from localds.memory.gpu_speed import device_hits, expected_gpu_speed
from localds.memory.placement import active_bytes, hit_rate, missed_bytes
from localds.memory.speeds import measure_peaks
from localds.usage import read_usage

if TYPE_CHECKING:
    from localds.gguf import GGUFFile
    from localds.memory.gpu_plan import GpuPlacement
    from localds.memory.placement import Placement
    from localds.memory.speeds import Speeds
    from localds.models.geometry import Geometry


def placement_report(gguf: GGUFFile, geometry: Geometry, placement: Placement) -> dict[str, Any]:
    """A model on the CPU; measures memory and disk, in two seconds, if they matter."""
    report = placement_sizes(placement)
    if placement.resident:
        return report
    hits = hit_rate(placement, read_usage(gguf, geometry.moe_layers, geometry.experts))
    missed = missed_bytes(gguf, geometry, hits)
    active = active_bytes(gguf, geometry, placement)
    memory, disk = measure_peaks().read, measure_disk(gguf.paths)
    return report | {
        "expected_hit_rate": hits,
        "expected_read_bytes_per_token": missed,
        "memory_bytes_per_second": memory,
        "disk_bytes_per_second": disk,
        "expected_tokens_per_second": 1 / max(missed / disk, active / memory),
    }


def placement_sizes(placement: Placement) -> dict[str, Any]:
    """What lies in RAM."""
    report: dict[str, Any] = {"budget_bytes": placement.budget, "resident": placement.resident}
    if placement.resident:
        return report | {"total_bytes": placement.total}
    return report | {
        "total_bytes": placement.total,
        "trunk_bytes": placement.plan.trunk,
        "cache_bytes": placement.plan.cache,
        "runtime_bytes": placement.plan.runtime,
        "pool_bytes": placement.pool,
        "slot_bytes": placement.slot_bytes,
        "slots": placement.slots,
        "slots_total": placement.slots_total,
    }


def gpu_report(
    gguf: GGUFFile,
    geometry: Geometry,
    placement: GpuPlacement,
    host: Placement,
    speeds: Speeds | None,
) -> dict[str, Any]:
    """What lies on a GPU; the speed if `speeds` are known."""
    usage = read_usage(gguf, geometry.moe_layers, geometry.experts)
    speed = None
    if speeds is not None:
        speed = expected_gpu_speed(placement, host, geometry, speeds, usage)
    return {
        "name": placement.gpu,
        "unified": placement.unified,
        "budget_bytes": placement.budget,
        "resident": placement.resident,
        "total_bytes": placement.total,
        "trunk_bytes": placement.weights,
        "cache_bytes": placement.cache,
        "scratch_bytes": placement.scratch,
        "staging_bytes": placement.staging,
        "pool_bytes": placement.pool,
        "slots": list(placement.slots),
        "slots_total": len(placement.slots) * placement.experts,
        "stream_from_tokens": placement.stream_from,
        "expected_hit_rate": device_hits(placement, usage),
        "upload_bytes_per_second": speeds.upload_bytes_per_second if speeds else None,
        "device_bytes_per_second": speeds.device_bytes_per_second if speeds else None,
        "expected_tokens_per_second": speed,
    }

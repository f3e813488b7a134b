"""The part of `localds inspect` on what lies in memory, and how fast that will be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localds.gguf import GGUFFile
    from localds.memory.placement import Placement
    from localds.models.geometry import Geometry


def placement_report(gguf: GGUFFile, geometry: Geometry, placement: Placement) -> dict[str, Any]:
    """Figures for people and programs; measures memory and disk, in two seconds, if they matter."""
    report: dict[str, Any] = {"budget_bytes": placement.budget, "resident": placement.resident}
    if placement.resident:
        return report
    from localds.commands.bench_runs import measure_peaks
    from localds.memory.disk import measure_disk
    from localds.memory.placement import active_bytes, hit_rate, missed_bytes
    from localds.usage import read_usage

    hits = hit_rate(placement, read_usage(gguf, geometry.moe_layers, geometry.experts))
    missed = missed_bytes(gguf, geometry, hits)
    active = active_bytes(gguf, geometry, placement)
    memory, disk = measure_peaks().read, measure_disk(gguf.paths)
    return report | {
        "total_bytes": placement.total,
        "trunk_bytes": placement.plan.trunk,
        "cache_bytes": placement.plan.cache,
        "runtime_bytes": placement.plan.runtime,
        "pool_bytes": placement.pool,
        "slot_bytes": placement.slot_bytes,
        "slots": placement.slots,
        "slots_total": placement.slots_total,
        "expected_hit_rate": hits,
        "expected_read_bytes_per_token": missed,
        "memory_bytes_per_second": memory,
        "disk_bytes_per_second": disk,
        "expected_tokens_per_second": 1 / max(missed / disk, active / memory),
    }


def placement_text(report: dict[str, Any]) -> str:
    """The figures for people."""
    from localds.units import format_size

    if report["budget_bytes"] is None:
        return ""
    budget = format_size(report["budget_bytes"])
    if report["resident"]:
        return f"\nAll of it fits in {budget}."
    sizes = {
        "all but the experts": report["trunk_bytes"],
        "cache": report["cache_bytes"],
        "runtime": report["runtime_bytes"],
        "experts": report["pool_bytes"],
        "total": report["total_bytes"],
    }
    notes = {
        "experts": f"  {report['slots']} of {report['slots_total']} at a time, "
        f"{format_size(report['slot_bytes'])} each"
    }
    read = format_size(report["expected_read_bytes_per_token"])
    return "\n".join(
        [
            "",
            f"In {budget}, with experts on disk",
            *(
                f"  {part:<22}{format_size(size):>10}{notes.get(part, '')}"
                for part, size in sizes.items()
            ),
            f"  expected in memory    {100 * report['expected_hit_rate']:.0f}% of the experts "
            "that a token needs",
            f"  expected from disk    {read} a token",
            f"  expected speed        {report['expected_tokens_per_second']:.3g} tokens/s at most: "
            f"disk {report['disk_bytes_per_second'] / 1e9:.3g} GB/s, "
            f"memory {report['memory_bytes_per_second'] / 1e9:.3g} GB/s",
        ]
    )

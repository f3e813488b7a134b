"""The part of `localds inspect` on what lies in memory, and how fast that will be."""

from __future__ import annotations

from typing import Any


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


def gpu_text(gpu: dict[str, Any], host: dict[str, Any]) -> str:
    """The figures of a model on a GPU, `gpu`, and of what lies beside it, `host`."""
    from localds.units import format_size

    sizes = {
        "all but the experts": gpu["trunk_bytes"],
        "cache": gpu["cache_bytes"],
        "scratch": gpu["scratch_bytes"],
        "experts": gpu["pool_bytes"],
        "experts on their way": gpu["staging_bytes"],
        "total": gpu["total_bytes"],
    }
    notes = {"experts": f"  {sum(gpu['slots'])} of {gpu['slots_total']}"}
    lines = [
        "",
        f"On {gpu['name']}, in {format_size(gpu['budget_bytes'])}",
        *(
            f"  {part:<22}{format_size(size):>10}{notes.get(part, '')}"
            for part, size in sizes.items()
            if size
        ),
    ]
    if gpu["resident"]:
        lines.append("All of it fits.")
    else:
        lines += [
            f"  expected there        {100 * gpu['expected_hit_rate']:.0f}% of the experts that a "
            "token needs",
            f"  the others            {_others(gpu)}",
            "",
            *_host_lines(host),
        ]
    if gpu["expected_tokens_per_second"] is not None:
        lines += ["", f"Expected speed: {gpu['expected_tokens_per_second']:.3g} tokens/s at most"]
    return "\n".join(lines)


def _others(gpu: dict[str, Any]) -> str:
    """What becomes of experts that the GPU lacks."""
    if gpu["unified"]:
        return "brought there when they are needed"
    if gpu["stream_from_tokens"] is None:
        return "computed by the CPU"
    return (
        f"computed by the CPU; brought there for prompts of {gpu['stream_from_tokens']} tokens "
        "and more"
    )


def _host_lines(host: dict[str, Any]) -> list[str]:
    """What lies in RAM beside a GPU."""
    from localds.units import format_size

    total = format_size(host["total_bytes"])
    if host["resident"]:
        return [f"In RAM beside it: {total}"]
    return [
        f"In RAM beside it: {total}, with experts on disk",
        f"  {'experts':<22}{format_size(host['pool_bytes']):>10}  {host['slots']} of "
        f"{host['slots_total']} at a time, {format_size(host['slot_bytes'])} each",
    ]

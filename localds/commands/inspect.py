"""`localds inspect`: what a GGUF file holds and what it takes to run it."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localds.commands.common import (
    CacheType,
    Context,
    CpuMoe,
    Device,
    ModelFile,
    NCpuMoe,
    Ram,
    Vram,
    clear_errors,
    fail,
    say,
)
from localds.commands.progress import show_percent

if TYPE_CHECKING:
    from localds.gguf import GGUFFile
    from localds.memory.plan import Plan
    from localds.models.geometry import Geometry
    from localds.on_gpu import GpuOptions
    from localds.ops.mlx_device import Gpu


def inspect(
    model: ModelFile,
    context: Context = None,
    cache_type: CacheType = "f16",
    device: Device = "auto",
    ram: Ram = None,
    vram: Vram = None,
    cpu_moe: CpuMoe = False,
    n_cpu_moe: NCpuMoe = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read every weight and look for non-finite values.")
    ] = False,
) -> None:
    """Show a model's geometry, quantization, the memory it takes, and what of it fits here."""
    from localds.catalog.resolve import find_model
    from localds.gguf import GGUFFile
    from localds.memory.machine import available_memory
    from localds.memory.plan import BudgetError, make_plan
    from localds.models import read_geometry
    from localds.on_gpu import GpuOptions, choose_gpu
    from localds.session import DEFAULT_CONTEXT

    with clear_errors():
        options = GpuOptions(vram, cpu_moe, n_cpu_moe)
        gpu = choose_gpu(device, options)
        with GGUFFile.open(find_model(model).path) as gguf:
            geometry = read_geometry(gguf)
            plan = make_plan(gguf, geometry, context or DEFAULT_CONTEXT, cache_type)
            report = _report(gguf, geometry, plan, cache_type, available_memory())
            refused: BudgetError | None = None
            try:
                report |= _places(gguf, geometry, plan, gpu, options, device, cache_type, ram)
            except BudgetError as error:
                refused = error
            typer.echo(json.dumps(report, indent=2) if as_json else _text(report))
            if check:
                _check(gguf)
            if refused:
                fail(refused)


def _places(
    gguf: GGUFFile,
    geometry: Geometry,
    plan: Plan,
    gpu: Gpu | None,
    options: GpuOptions,
    device: str,
    cache_type: str,
    ram: str | None,
) -> dict[str, Any]:
    """What lies where, as `localds.load` would do it; raises `BudgetError`."""
    from localds.memory.plan import BudgetError
    from localds.ops.mlx_device import GpuError

    if gpu is not None:
        try:
            return _on_gpu(gguf, geometry, plan, gpu, options, cache_type, ram)
        except (BudgetError, GpuError) as error:
            if device == "gpu" or options.given():
                raise
            say(f"localds: computing on the CPU: {error}")
    return _on_cpu(gguf, geometry, plan, ram)


def _on_cpu(gguf: GGUFFile, geometry: Geometry, plan: Plan, ram: str | None) -> dict[str, Any]:
    """What lies where of a model on the CPU; raises `BudgetError`."""
    from localds.memory.machine import budget_for
    from localds.memory.placement import place
    from localds.memory.report import placement_report

    placement = place(gguf, geometry, plan, budget_for(ram))
    return {"device": "cpu", "placement": placement_report(gguf, geometry, placement)}


def _on_gpu(
    gguf: GGUFFile,
    geometry: Geometry,
    plan: Plan,
    gpu: Gpu,
    options: GpuOptions,
    cache_type: str,
    ram: str | None,
) -> dict[str, Any]:
    """What lies where of a model on a GPU; raises `BudgetError`."""
    from localds.memory.machine import budget_for
    from localds.memory.plan import DEFAULT_CHUNK
    from localds.memory.report import gpu_report, placement_sizes
    from localds.on_gpu import OnGpu

    budget = budget_for(ram)
    on_gpu = OnGpu(
        *(gguf, geometry, gpu, options, plan),
        chunk=DEFAULT_CHUNK,
        cache_type=cache_type,
        ram=budget,
        on_note=lambda note: say(f"localds: {note}"),
    )
    host = on_gpu.beside(budget)
    return {
        "device": "gpu",
        "gpu": gpu_report(gguf, geometry, on_gpu.placement, host, on_gpu.speeds),
        "placement": placement_sizes(host),
    }


def _report(
    gguf: GGUFFile, geometry: Geometry, plan: Plan, cache_type: str, available: int | None
) -> dict[str, Any]:
    types = Counter[str]()
    counts = Counter[str]()
    for tensor in gguf.tensors.values():
        types[tensor.type.name] += tensor.nbytes
        counts[tensor.type.name] += 1
    # Compared in 16 bits, whatever type the cache has.
    expanded = 2 * geometry.layers * geometry.expanded_width
    return {
        "file": str(gguf.path),
        "name": gguf.text("general.name", ""),
        "architecture": geometry.architecture,
        "file_bytes": gguf.file_bytes,
        "parameters": sum(tensor.n_elements for tensor in gguf.tensors.values()),
        "layers": geometry.layers,
        "dense_layers": geometry.dense_layers,
        "hidden": geometry.hidden,
        "heads": geometry.heads,
        "vocabulary": geometry.vocabulary,
        "context_length": geometry.context_length,
        "experts": geometry.experts,
        "experts_used": geometry.experts_used,
        "experts_shared": geometry.experts_shared,
        "types": {
            name: {"tensors": counts[name], "bytes": size} for name, size in types.most_common()
        },
        "parts": plan.parts,
        "cache": {
            "type": cache_type,
            "width": geometry.cache_width,
            "bytes_per_token": plan.cache_per_token,
            "expanded_bytes_per_token": expanded,
            "times_smaller": round(expanded / plan.cache_per_token, 2),
        },
        "memory": {
            "context": plan.context,
            "weights_bytes": plan.weights,
            "cache_bytes": plan.cache,
            "runtime_bytes": plan.runtime,
            "total_bytes": plan.total,
            "available_bytes": available,
        },
    }


def _text(report: dict[str, Any]) -> str:
    from localds.commands.inspect_placement import gpu_text, placement_text
    from localds.units import format_size

    cache, memory = report["cache"], report["memory"]
    lines = [
        f"{report['name'] or report['file']}",
        f"  architecture   {report['architecture']}, {report['parameters'] / 1e9:.3g} B parameters",
        f"  layers         {report['layers']}, of which {report['dense_layers']} dense; "
        f"hidden {report['hidden']}, {report['heads']} heads",
    ]
    if report["experts"]:
        lines.append(
            f"  experts        {report['experts_used']} of {report['experts']} per token, "
            f"{report['experts_shared']} shared"
        )
    lines += [
        f"  vocabulary     {report['vocabulary']}",
        f"  context        {report['context_length']} tokens",
        "",
        "Weights by type",
        *(
            f"  {name:<22}{format_size(t['bytes']):>10}  {t['tensors']} tensors"
            for name, t in report["types"].items()
        ),
        "",
        "Weights by part",
        *(f"  {part:<22}{format_size(size):>10}" for part, size in report["parts"].items()),
        "",
        f"Cache ({cache['type']})",
        f"  row                   {cache['width']} elements per token and layer",
        f"  per token             {format_size(cache['bytes_per_token'])}, "
        f"{cache['times_smaller']:g} times smaller than expanded keys and values in f16",
        "",
        f"Memory with {memory['context']} tokens of context",
        f"  {'weights':<22}{format_size(memory['weights_bytes']):>10}",
        f"  {'cache':<22}{format_size(memory['cache_bytes']):>10}",
        f"  {'runtime':<22}{format_size(memory['runtime_bytes']):>10}",
        f"  {'total':<22}{format_size(memory['total_bytes']):>10}",
    ]
    if memory["available_bytes"] is not None:
        lines.append(f"  {'available here':<22}{format_size(memory['available_bytes']):>10}")
    if "gpu" in report:
        lines.append(gpu_text(report["gpu"], report["placement"]))
    elif "placement" in report:
        lines.append(placement_text(report["placement"]))
    return "\n".join(lines)


def _check(gguf: GGUFFile) -> None:
    """Read all weights; exit with status 1 where some are not finite."""
    from localds.gguf.scales import find_nonfinite

    broken = find_nonfinite(gguf, show_percent("checked"))
    if broken:
        listed = "\n".join(f"  {tensor.name}: {count} scales" for tensor, count in broken)
        fail(f"{gguf.path} holds non-finite values; fetch or convert it again:\n{listed}")
    typer.echo("All weights are finite.", err=True)

"""A model whose experts do not all fit on the GPU: speeds, hits, and where the time goes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from gpu_report import Report
from gpu_runs import Memory, Runs, add_model_options, load, sizes
from gpu_stopwatch import CPU, READING, watched

import localds
from localds.commands.bench_gpu import decode_limit
from localds.model import Model
from localds.ops.mlx.split import SplitMoe

START = 8
ALWAYS, NEVER = 1, float("inf")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--vram", help="the default holds about half of the experts")
    parser.add_argument("--cpu-moe", action="store_true")
    parser.add_argument("--n-cpu-moe", type=int)


def run(arguments: argparse.Namespace, report: Report) -> None:
    size = sizes(arguments)
    context = size.long + 2 * size.tokens
    options: dict[str, Any] = {"vram": arguments.vram}
    if arguments.cpu_moe or arguments.n_cpu_moe is not None:
        options |= {"cpu_moe": arguments.cpu_moe, "n_cpu_moe": arguments.n_cpu_moe}
    elif arguments.vram is None:
        options["vram"] = half_of_experts(arguments, context)
    memory = Memory(arguments.file)
    with load(arguments, report, context, **options) as model:
        placement = model.on_gpu.placement
        if placement.resident:
            report.fail("placement", "all fits on the GPU; give less --vram")
            return
        whole = len(placement.slots) * placement.experts
        report.figure("experts on the GPU", sum(placement.slots) / whole, "", f"of {whole}")
        planned = "never" if placement.stream_from is None else str(placement.stream_from)
        report.figure("experts brought to the GPU from tokens", planned)
        runs = Runs(model, context, arguments.chunk)
        measure_decode(model, runs, report, START, size.tokens, size.rounds)
        measure_prefills(model, runs, report, size.short, size.rounds)
        measure_prefills(model, runs, report, size.long, 1)
        set_streaming(model, placement.stream_from or NEVER)
        measure_decode(model, runs, report, size.long, size.tokens, 1)
        memory.tell(model, report, f"{context} tokens")


def half_of_experts(arguments: argparse.Namespace, context: int) -> int:
    """Bytes that hold about half of the experts."""
    with localds.load(
        arguments.file, device="gpu", context=context, chunk=min(arguments.chunk, context)
    ) as model:
        placement = model.on_gpu.placement
    staging = 2 * placement.experts * max(placement.expert_bytes)
    return placement.total - placement.pool // 2 + min(staging, 2 * (128 << 20))


def measure_decode(
    model: Model, runs: Runs, report: Report, depth: int, count: int, rounds: int
) -> None:
    runs.decode(depth, 2)
    before = model.on_gpu.hits()
    speeds = [runs.decode(depth, count) for _ in range(rounds)]
    hits, uses = (b - a for a, b in zip(before, model.on_gpu.hits(), strict=True))
    limit = decode_limit(model)
    note = f"{hits / uses:.1%} of the experts used lay on the GPU"
    note += f", at most {limit:.0f} by reading the weights" if limit else ""
    report.figure(f"decode {count} at {depth}", speeds, "tokens/s", note)
    tell_times(model, report, f"a token at {depth}", partial(runs.decode, depth, count), count)


def measure_prefills(model: Model, runs: Runs, report: Report, count: int, rounds: int) -> None:
    """With experts brought to the GPU and without, in turns; what is planned is one of them."""
    ways = {"experts brought to the GPU": ALWAYS, "experts on the CPU": NEVER}
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, stream_from in ways.items():
            set_streaming(model, stream_from)
            speed = runs.fresh_prefill(count)
            if number or rounds == 1:  # the first one compiles
                samples[way].append(speed)
        if rounds == 1:
            break
    for way, speeds in samples.items():
        report.figure(f"prefill {count}, {way}", speeds, "tokens/s")
        set_streaming(model, ways[way])
        if rounds > 1:
            prefill = partial(runs.fresh_prefill, count)
            tell_times(model, report, f"prefill {count}, {way}", prefill, 1)


def split_layers(model: Model) -> list[SplitMoe]:
    forwards = (layer.feed_forward for layer in model.decoder.layers)
    return [forward for forward in forwards if isinstance(forward, SplitMoe)]


def set_streaming(model: Model, stream_from: float) -> None:
    for layer in split_layers(model):
        layer.staging = replace(layer.staging, stream_from=stream_from)


def tell_times(
    model: Model, report: Report, what: str, work: Callable[[], Any], units: int
) -> None:
    """Once more with clocks: milliseconds of a unit, and of them, what the main thread did."""
    layers = split_layers(model)
    with watched(layers) as clocks:
        started = time.perf_counter()
        work()
        whole = time.perf_counter() - started
    # Read in a thread of its own, so that it does not add up with the rest.
    reading = clocks.pop(READING, 0.0)
    parts = {**clocks, "else": whole - sum(clocks.values())}
    note = ", ".join(f"{name} {1e3 * seconds / units:.2f}" for name, seconds in parts.items())
    note += f"; {READING} {1e3 * reading / units:.2f}"
    note += f"; {1e6 * clocks[CPU] / units / len(layers):.0f} us of the CPU a layer"
    report.figure(f"time of {what}", 1e3 * whole / units, "ms", note)

"""A model that lies on the GPU as a whole: loading, memory, prefill and decoding."""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
from gpu_parity import mean_kl
from gpu_report import Report
from gpu_runs import Memory, Runs, add_model_options, load, sizes

from localds.commands.bench_gpu import decode_limit
from localds.model import Model

START = 8
"""Tokens in the cache where decoding is called shallow."""

add_options = add_model_options


def run(arguments: argparse.Namespace, report: Report) -> None:
    size = sizes(arguments)
    context = size.long + 2 * size.tokens
    memory = Memory(arguments.file)
    with load(arguments, report, context) as model:
        if not model.on_gpu.placement.resident:
            report.fail("placement", "not all fits on the GPU; use `split`")
            return
        memory.tell(model, report, "loaded")
        report.guarded("pieces", partial(compare_pieces, model, report))
        runs = Runs(model, context, arguments.chunk)
        first = runs.fresh_prefill(size.short)
        report.figure(f"prefill {size.short}, the first time", first, "tokens/s")
        measure_prefill(runs, report, size.short, 2 * size.rounds - 1)
        for depth in (START, size.long):
            measure_decode(model, runs, report, depth, size.tokens, size.rounds)
        measure_prefill(runs, report, size.long, size.rounds)
        memory.tell(model, report, f"{context} tokens")


def measure_prefill(runs: Runs, report: Report, count: int, rounds: int) -> None:
    report.figure(
        f"prefill {count}", [runs.fresh_prefill(count) for _ in range(rounds)], "tokens/s"
    )


def measure_decode(
    model: Model, runs: Runs, report: Report, depth: int, count: int, rounds: int
) -> None:
    """Both ways in turns, after one that builds the graph."""
    runs.decode(depth, 2)
    ways = {"": runs.decode_ahead, ", each waited for": runs.decode}
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, decode in ways.items():
            samples[way].append(decode(depth, count))
    limit = decode_limit(model)
    note = f"at most {limit:.0f} by reading the weights" if limit else ""
    for way, speeds in samples.items():
        report.figure(f"decode {count} at {depth}{way}", speeds, "tokens/s", note)


def compare_pieces(model: Model, report: Report) -> None:
    """The same tokens at once, which rounds to float16, and one by one."""
    count = 24
    ids = Runs(model, count, count).ids(count)
    together = model.decoder.forward(ids, model.decoder.new_cache(count, "f16"), last_only=False)
    cache = model.decoder.new_cache(count, "f16")
    single = np.concatenate([model.decoder.forward(ids[i : i + 1], cache) for i in range(count)])
    worst = np.abs(single - together).max() / np.abs(single).max()
    report.figure(
        "KL of tokens at once from one by one", mean_kl(single, together), "", f"off by {worst:.1e}"
    )

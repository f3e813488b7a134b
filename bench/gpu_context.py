"""Long contexts on the GPU: prefill and decoding at depth, and memory, by the cache's type.

The first depth is computed. For the others its rows are repeated, which costs no time, and some
more tokens are read and generated there: speed does not depend on what rows hold.
"""

from __future__ import annotations

import argparse
from functools import partial

import mlx.core as mx
from gpu_report import Report
from gpu_runs import Memory, Runs, add_model_options, load, sizes

from localds import models
from localds.gguf import GGUFFile

DEPTHS = (32 << 10, 128 << 10)
SMALL_DEPTHS = (64, 160)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--cache-types", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--depths", type=int, nargs="+")


def run(arguments: argparse.Namespace, report: Report) -> None:
    with GGUFFile.open(arguments.file) as gguf:
        width = models.read_geometry(gguf).cache_width
    for cache_type in arguments.cache_types:
        if cache_type == "q8_0" and width % 32:
            report.figure(cache_type, f"not for rows of {width} values")
            continue
        report.guarded(cache_type, partial(measure, arguments, report, cache_type))
        mx.clear_cache()


def measure(arguments: argparse.Namespace, report: Report, cache_type: str) -> None:
    size = sizes(arguments)
    depths = arguments.depths or (SMALL_DEPTHS if arguments.small else DEPTHS)
    more = min(arguments.chunk, size.long)
    context = max(depths) + more + 2 * size.tokens
    memory = Memory(arguments.file)
    with load(arguments, report, context, cache_type=cache_type) as model:
        runs = Runs(model, context, arguments.chunk, cache_type)
        runs.fresh_prefill(min(more, depths[0]))  # compiles
        speed = runs.fresh_prefill(depths[0])
        report.figure(f"{cache_type}: prefill {depths[0]}", speed, "tokens/s")
        for depth in depths:
            if runs.cache.length < depth:
                runs.fill(depth)
            speeds = [read_at(runs, depth, more) for _ in range(2)]
            report.figure(f"{cache_type}: prefill {more} at {depth}", max(speeds), "tokens/s")
            runs.decode(depth, 2)
            ahead = [runs.decode_ahead(depth, size.tokens) for _ in range(size.rounds)]
            report.figure(f"{cache_type}: decode {size.tokens} at {depth}", ahead, "tokens/s")
        memory.tell(model, report, f"{cache_type}, {context} tokens")


def read_at(runs: Runs, depth: int, count: int) -> float:
    runs.to_depth(depth)
    return runs.prefill(count)

"""Our kernels' own proofs on this GPU, and how long each takes to compile."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from gpu_report import Report

from localds.ops.mlx_device import failed_kernels, find_gpu

SLOWEST = 8


def add_options(_: argparse.ArgumentParser) -> None:
    """No more than all commands have."""


def run(_: argparse.Namespace, report: Report) -> None:
    gpu = find_gpu()
    with compile_times(gpu.kind) as compiled:
        started = time.perf_counter()
        failures = failed_kernels(gpu)
        took = time.perf_counter() - started
    if failures is None:
        report.figure("kernels", "none: MLX's CPU device stands in")
        return
    report.figure("proofs of all kernels", took, "s", f"{len(compiled)} compiled")
    if compiled:
        report.figure("compiling them", sum(compiled.values()), "s")
        slowest = sorted(compiled.items(), key=lambda item: -item[1])[:SLOWEST]
        report.say("the slowest: " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in slowest))
    for name, reason in failures.items():
        report.fail(name, reason)
    if not failures:
        report.figure("kernels", "all right")


@contextmanager
def compile_times(kind: str) -> Iterator[dict[str, float]]:
    """Seconds of each kernel that is compiled meanwhile; Metal compiles unseen."""
    times: dict[str, float] = {}
    if kind != "cuda":
        yield times
        return
    from localds.ops.mlx.cuda import source

    compiled = source.compiled

    def timed(name: str, block: Any, constants: Any) -> bytes:
        started = time.perf_counter()
        code = compiled(name, block, constants)
        words = [name, *([block.name] if block else []), *(f"{key}={of}" for key, of in constants)]
        times.setdefault(" ".join(words), time.perf_counter() - started)
        return code

    with patch.object(source, "compiled", timed):
        yield times

"""The GPU, and what it does at best."""

from __future__ import annotations

import argparse
from functools import partial

import mlx.core as mx
from gpu_report import Report
from gpu_timing import seconds
from gpu_vram import ask_driver

from localds import _native
from localds.memory.speeds import refresh_speeds
from localds.ops.mlx_device import find_gpu, open_gpu


def add_options(_: argparse.ArgumentParser) -> None:
    """No more than all commands have."""


def run(arguments: argparse.Namespace, report: Report) -> None:
    gpu = find_gpu()
    _, stream = open_gpu(gpu)
    note = f"{gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
    report.figure("GPU", gpu.name, note=note)
    report.figure("MLX", mx.__version__)
    if told := ask_driver("driver_version,clocks.sm,clocks.mem"):
        report.figure("driver, clocks of processors and memory in MHz", told)
    with mx.stream(stream):
        measure(report, small=arguments.small)
    speeds = refresh_speeds(gpu)
    for what in ("upload", "device", "memory"):
        rate = getattr(speeds, f"{what}_bytes_per_second")
        report.figure(f"planner's speed, {what}", rate / 1e9, "GB/s")
    note = f"{_native.threads()} threads, {_native.isa()}"
    report.figure("planner's speed, CPU", speeds.multiply_adds_per_second / 1e9, "G/s", note)


def measure(report: Report, *, small: bool) -> None:
    n, big = (256, 1 << 20) if small else (4096, 1 << 28)
    x = mx.random.normal((n, n)).astype(mx.float16)
    took = seconds(lambda: x @ x)
    report.figure(f"product of {n} in float16", 2 * n**3 / took / 1e12, "TFLOP/s")
    values = mx.zeros((big,), mx.float32)
    took = seconds(lambda: values + 1)
    report.figure("reading and writing", 2 * values.nbytes / took / 1e9, "GB/s")
    matrix = mx.random.normal((8, 8))

    def chain(length: int) -> mx.array:
        y = matrix
        for _ in range(length):
            y = y @ matrix
        return y

    few, many = seconds(partial(chain, 100)), seconds(partial(chain, 1100))
    report.figure("a small product in a chain", (many - few) * 1e3, "us")

"""Which kernels the GPU spends its time in, as torch's profiler sees them."""

from __future__ import annotations

import argparse
from functools import partial

from gpu_report import Report
from gpu_runs import Runs, add_model_options, load, sizes

START = 8
STEPS = 8

add_options = add_model_options


def run(arguments: argparse.Namespace, report: Report) -> None:
    import torch

    size = sizes(arguments)
    context = size.short + 4 * STEPS
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with load(arguments, report, context) as model:
        runs = Runs(model, context, arguments.chunk)
        for name, work in {
            f"{STEPS} tokens at {START}": partial(runs.decode_ahead, START, STEPS),
            f"prefill {size.short}": partial(runs.fresh_prefill, size.short),
        }.items():
            work()
            with torch.profiler.profile(activities=activities) as recorded:
                work()
            table = recorded.key_averages().table(
                sort_by="self_device_time_total", row_limit=32, max_name_column_width=70
            )
            lines = [line[:70] + line[-75:] for line in table.splitlines()]
            report.say("\n".join([f"==== {name}", *lines]))

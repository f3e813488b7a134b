"""How long operations on MLX take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx


def seconds(work: Callable[[], Any], runs: int = 7) -> float:
    """Median time of `work`, whose result is waited for, after one run to warm up."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])

"""How fast bytes come to the GPU, and from its own memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from localds.ops.mlx_device import open_gpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.ops.mlx_device import Gpu

_UPLOAD = 64 << 20
_COPY = 256 << 20
_COPIES = 4
_SECONDS = 0.4


def measure_gpu(gpu: Gpu) -> tuple[float, float]:
    """Bytes a second from RAM to `gpu`, and from the memory of `gpu`; takes a second."""
    import mlx.core as mx

    _, stream = open_gpu(gpu)
    with mx.stream(stream):
        speeds = _upload_speed(), _device_speed(min(_COPY, gpu.free_bytes // 16))
        mx.clear_cache()
    return speeds


def _upload_speed() -> float:
    import mlx.core as mx

    rows = np.ones(_UPLOAD, np.uint8)

    def upload() -> None:
        # What MLX makes from numpy's lies where the system put it; the sum, on the device.
        mx.eval(mx.array(rows) + mx.array(0, mx.uint8))

    return _UPLOAD / _least_seconds(upload)


def _device_speed(nbytes: int) -> float:
    import mlx.core as mx

    words = mx.zeros(nbytes // 4)
    mx.eval(words)

    def copy() -> None:
        last = words
        for _ in range(_COPIES):
            last = last + 1.0
        mx.eval(last)

    # A copy reads and writes.
    return 2 * _COPIES * nbytes / _least_seconds(copy)


def _least_seconds(work: Callable[[], None]) -> float:
    """The shortest of several goes, after one that finds everything cold."""
    work()
    least = float("inf")
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least

"""Where MLX computes, and what its failures are told as."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx_device import GpuError

if TYPE_CHECKING:
    from collections.abc import Iterator


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here. On its CPU device, `mx.compile` calls a C++ compiler."""
    return mx.default_device() == mx.Device(mx.gpu)


@contextmanager
def computing(stream: mx.Stream) -> Iterator[None]:
    """Compute in `stream`. Raises `GpuError` where MLX gives up, for want of memory above all."""
    try:
        with mx.stream(stream):
            yield
    except RuntimeError as error:
        raise GpuError(
            f"the GPU failed ({error}); if it is short of memory, give less with --vram, choose a "
            "smaller --context, or compute on the CPU with --device cpu"
        ) from error

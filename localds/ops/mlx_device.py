"""The GPU, where MLX is installed and finds one. Importing this imports no MLX.

The environment variable LOCALDS_GPU takes the place of what is there: "cpu" makes MLX's CPU device
stand in for a GPU with memory of its own and "cpu-unified" for one that shares the machine's, both
for tests; "none" hides the GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from localds.memory.machine import available_memory, total_memory
from localds.ops.mlx_install import how_to_install, why_broken, why_no_gpu, wrong_version

if TYPE_CHECKING:
    import mlx.core as mx

    from localds.ops.mlx.backend import Backend

VARIABLE = "LOCALDS_GPU"
_VALUES = ("cpu", "cpu-unified", "none")


class NoGpuError(ValueError):
    """There is no GPU to compute on: why, and what to install."""


class GpuError(OSError):
    """The GPU failed while it computed."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that MLX can use, and its memory when it was found, in bytes.

    The kind "cpu" is MLX's CPU device, standing in. `unified` memory is the machine's own.
    """

    name: str
    kind: Literal["cuda", "metal", "cpu"]
    total_bytes: int
    free_bytes: int
    unified: bool


def find_gpu() -> Gpu:
    """The GPU of this machine.

    Raises `NoGpuError` where there is none, and `ValueError` for an unknown value of LOCALDS_GPU.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *_VALUES):
        raise ValueError(f"{VARIABLE}={wanted!r} is not one of {', '.join(_VALUES)}; unset it")
    if wanted == "none":
        raise NoGpuError(f"the GPU is hidden by {VARIABLE}=none; unset it")
    check_mlx()
    if wanted:
        return _stand_in(unified=wanted == "cpu-unified")
    import mlx.core as mx

    if not mx.is_available(mx.gpu):
        raise NoGpuError(why_no_gpu())
    _check_computing()
    return _cuda_gpu() if mx.cuda.is_available() else _metal_gpu()


def check_mlx() -> None:
    """Raise `NoGpuError` unless an MLX that localds works with is installed and loads."""
    if find_spec("mlx") is None:
        raise NoGpuError(f"a GPU needs MLX, which is not installed; {how_to_install()}")
    if problem := wrong_version():
        raise NoGpuError(problem)
    try:
        import mlx.core  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise NoGpuError(why_broken(error)) from error


def open_gpu(gpu: Gpu) -> tuple[Backend, mx.Stream]:
    """How to compute on `gpu`, and a stream on it that any thread may use, one at a time."""
    import mlx.core as mx

    from localds.ops.mlx.backend import PORTABLE

    stream = mx.new_thread_unsafe_stream(mx.cpu if gpu.kind == "cpu" else mx.gpu)
    if gpu.kind == "cuda":
        from localds.ops.mlx.cuda import CudaBackend

        return CudaBackend(), stream
    if gpu.kind == "metal":
        from localds.ops.mlx.metal import MetalBackend

        return MetalBackend(), stream
    return PORTABLE, stream


def failed_kernels(gpu: Gpu) -> dict[str, str] | None:
    """Kernels of localds that do not work on `gpu`, and why; None for a stand-in, which has none.

    MLX's operations take their place.
    """
    if gpu.kind == "cpu":
        return None
    import mlx.core as mx

    with mx.stream(mx.gpu):
        if gpu.kind == "cuda":
            from localds.ops.mlx.cuda.proof import failures
        else:
            from localds.ops.mlx.metal.proof import failures
        return failures()


def _check_computing() -> None:
    import mlx.core as mx

    try:
        with mx.stream(mx.gpu):
            mx.eval(mx.ones(2) + 1)
    except (RuntimeError, ValueError) as error:
        raise NoGpuError(
            f"the GPU that MLX finds does not compute ({error}); it needs an NVIDIA card of 2018 "
            "(Turing) or newer with a driver to match, or a Mac with Apple silicon and macOS 14"
        ) from error


def _stand_in(*, unified: bool) -> Gpu:
    total = total_memory() or 0
    return Gpu("MLX's CPU device", "cpu", total, _at_most(total), unified)


def _cuda_gpu() -> Gpu:
    import mlx.core as mx

    info = mx.device_info(mx.gpu)
    return Gpu(
        str(info["device_name"]),
        "cuda",
        int(info["total_memory"]),
        int(info["free_memory"]),
        unified=False,
    )


def _metal_gpu() -> Gpu:
    import mlx.core as mx

    info = mx.device_info(mx.gpu)
    # What Metal keeps resident; the rest of the memory is for others.
    total = int(info["max_recommended_working_set_size"])
    return Gpu(str(info["device_name"]), "metal", total, _at_most(total), unified=True)


def _at_most(total: int) -> int:
    """What is free of a machine's memory, where the system says so, and no more than `total`."""
    free = available_memory()
    return total if free is None else min(total, free)

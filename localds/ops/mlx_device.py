"""The GPU, where MLX is installed and finds one. Importing this imports no MLX."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localds.ops.mlx.backend import Backend

INSTALL = (
    "on a Mac: pip install mlx; on Linux with an NVIDIA card: pip install 'mlx[cuda13]' "
    "(without mlx-cpu, whose files it shares)"
)


def check_gpu() -> None:
    """Raise `ValueError` unless MLX is installed and finds a GPU."""
    if find_spec("mlx") is None:
        raise ValueError(f"device 'gpu' needs MLX, which is not installed; {INSTALL}")
    import mlx.core as mx

    if not mx.is_available(mx.gpu):
        raise ValueError(f"device 'gpu': the MLX that is installed finds no GPU; {INSTALL}")


def gpu_backend() -> Backend:
    """How to compute on the GPU that MLX finds; makes it MLX's default device."""
    import mlx.core as mx

    from localds.ops.mlx.backend import PORTABLE

    mx.set_default_device(mx.gpu)
    if not mx.cuda.is_available():
        return PORTABLE
    from localds.ops.mlx.cuda import CudaBackend

    return CudaBackend()

"""NVIDIA GPUs: kernels of our own on GGUF blocks, compiled by MLX when they are first used."""

from localds.ops.mlx.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]

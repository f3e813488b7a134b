"""Apple silicon: kernels of our own for what MLX has none for, compiled when first used."""

from localds.ops.mlx.metal.backend import MetalBackend

__all__ = ["MetalBackend"]

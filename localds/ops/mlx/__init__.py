"""MLX: the GPU of a Mac (Metal) or of NVIDIA (CUDA). Importing it needs the package mlx."""

from localds.ops.mlx.build import build_decoder
from localds.ops.mlx.decoder import MlxDecoder
from localds.ops.mlx.ops import MlxOps

__all__ = ["MlxDecoder", "MlxOps", "build_decoder"]

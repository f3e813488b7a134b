"""`Backend` for Apple silicon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.ops.mlx.backend import Portable
from localds.ops.mlx.matrix import portable_matrix
from localds.ops.mlx.metal.attention import MetalMla
from localds.ops.mlx.metal.matrix import MetalMatrix
from localds.ops.mlx.metal.proof import matrix_failure

if TYPE_CHECKING:
    from localds.gguf import GGMLType
    from localds.ops.mlx.attention import MlxMla
    from localds.ops.mlx.matrix import Bytes, Matrix


class MetalBackend(Portable):
    """MLX's operations, and kernels of our own on the file's blocks where MLX has no form."""

    mla: type[MlxMla] = MetalMla

    def load(self, kind: GGMLType, rows: Bytes) -> Matrix:
        """Bring `rows` uint8 [..., rows, bytes] from the file's map to the device.

        Types whose kernels fail on it (`proof.matrix_failure` says why) are computed by MLX.
        """
        if matrix_failure(kind):
            return portable_matrix(kind, rows)
        blocks = mx.array(rows)
        mx.eval(blocks)
        return MetalMatrix(kind, blocks)

"""What differs between devices: how matrices are kept, and which operations are fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from localds.ops.mlx.attention import MlxMla
from localds.ops.mlx.feed_forward import Gated
from localds.ops.mlx.matrix import portable_bytes, portable_matrix
from localds.ops.mlx.routing import MlxRouter

if TYPE_CHECKING:
    import mlx.core as mx

    from localds.gguf import GGMLType
    from localds.ops import Router
    from localds.ops.mlx.feed_forward import Choose
    from localds.ops.mlx.matrix import Bytes, Matrix


class Backend(Protocol):
    """How one kind of device does it. `mla` is its multi-head latent attention."""

    mla: type[MlxMla]

    def load(self, kind: GGMLType, rows: Bytes) -> Matrix:
        """Bring `rows` uint8 [..., rows, bytes] from the file's map to the device."""
        ...

    def device_bytes(self, kind: GGMLType, nbytes: int) -> int:
        """Bytes on the device of `nbytes` of a type in the file, once `load` has brought them."""
        ...

    def gated(self, gate: Matrix, up: Matrix | None, down: Matrix) -> Gated:
        """A SwiGLU of matrices that `load` made; without `up`, `gate` holds the rows of both."""
        ...

    def router(self, router: Router, weight: mx.array, bias: mx.array | None) -> Choose:
        """The choice of experts."""
        ...


class Portable:
    """MLX's own operations alone."""

    mla: type[MlxMla] = MlxMla

    def load(self, kind: GGMLType, rows: Bytes) -> Matrix:  # noqa: D102
        return portable_matrix(kind, rows)

    def device_bytes(self, kind: GGMLType, nbytes: int) -> int:  # noqa: D102
        return portable_bytes(kind, nbytes)

    def gated(self, gate: Matrix, up: Matrix | None, down: Matrix) -> Gated:  # noqa: D102
        return Gated(gate, up, down)

    def router(  # noqa: D102
        self, router: Router, weight: mx.array, bias: mx.array | None
    ) -> Choose:
        return MlxRouter(router, weight, bias)


PORTABLE = Portable()

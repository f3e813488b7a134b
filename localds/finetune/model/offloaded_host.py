"""Experts on the host, as training brings them to the device: gate, up and down each for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from localds.finetune.model.matrices import written
from localds.ops.mlx.matrix import PackedMatrix, PlainMatrix
from localds.ops.mlx.ops import expert_tensors
from localds.ops.mlx.staging import HostExperts
from localds.ops.tensors import vector_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from localds.gguf import GGMLType
    from localds.memory.experts import ExpertStore
    from localds.ops import MoeWeights
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.feed_forward import Gated
    from localds.ops.mlx.matrix import Bytes, Matrix


class ApartExperts(HostExperts):
    """As `HostExperts`, but gate and up come apart where the file has them in one tensor."""

    def read(self, ids: NDArray[np.int32]) -> list[Bytes]:
        """The bytes of the experts `ids`, ascending: gate, up and down, each [m, rows, bytes]."""
        parts = super().read(ids)
        if len(parts) == 2:
            both, down = parts
            gate, up = (np.ascontiguousarray(half) for half in np.split(both, 2, axis=1))
            parts = [gate, up, down]
        return parts

    def load(self, backend: Backend, parts: Sequence[Bytes]) -> Gated:
        """Bring gate, up and down to the device: a stack of experts, or one expert."""
        gate, up, down = (
            backend.load(kind, part) for kind, part in zip(self.kinds, parts, strict=True)
        )
        return backend.gated(gate, up, down)

    @property
    def kinds(self) -> tuple[GGMLType, GGMLType, GGMLType]:
        """The types of gate, up and down."""
        first, *_, last = self.tensors
        return first.type, self.tensors[-2].type, last.type


def host_of(weights: MoeWeights, experts: int, store: ExpertStore | None) -> ApartExperts:
    """Where the experts of a layer lie: in the file's map, or with a `store`, there."""
    tensors = expert_tensors(weights, vector_width(weights.norm), experts)
    if store is None:
        return ApartExperts(tensors, experts)
    return ApartExperts(tensors, experts, store, store.number(weights))


def staged_bytes(host: HostExperts, backend: Backend) -> int:
    """What an expert of a piece takes in device memory while the next piece is brought there.

    Twice its matrices, and twice their values, where products need these written out. What the
    backend needs for loading, a matrix at a time, is not counted.
    """
    one = host.load(backend, [part[0] for part in host.read(np.zeros(1, np.int32))])
    kept = sum(array.nbytes for array in one.arrays())
    matrices = [matrix for matrix in (one.gate, one.up, one.down) if matrix is not None]
    return 2 * (kept + sum(_written_bytes(matrix) for matrix in matrices))


def _written_bytes(matrix: Matrix) -> int:
    if isinstance(matrix, PackedMatrix):
        return 0
    if isinstance(matrix, PlainMatrix) and matrix.weight.dtype == mx.float32:
        return 0
    return written(matrix).nbytes

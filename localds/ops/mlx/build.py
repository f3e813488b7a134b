"""A whole model brought to MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds import models
from localds.memory.placement import routed_tensors
from localds.memory.plan import is_trunk
from localds.ops.mlx.computing import computing
from localds.ops.mlx.decoder import MlxDecoder
from localds.ops.mlx.ops import MlxOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.gguf import GGUFFile, Tensor
    from localds.models.geometry import Geometry
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.splitting import Split


def build_decoder(
    gguf: GGUFFile,
    backend: Backend,
    stream: mx.Stream,
    split: Split | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MlxDecoder:
    """Prepare the model in `gguf`, all of it on the device unless there is a `split`.

    `on_progress(done, total)` counts the file's bytes. Raises `GGUFError` for what does not fit,
    `ReadError` where the disk fails.
    """
    geometry = models.read_geometry(gguf)
    total = _file_bytes(gguf, geometry, split)
    count = _counter(gguf, total, on_progress)
    with computing(stream):
        built = models.build(gguf, MlxOps(backend, split, count))
        mx.clear_cache()  # what loading took apart
    if on_progress:
        on_progress(total, total)  # vectors were not counted
    return MlxDecoder(built.geometry, built.embedding, built.layers, built.head, stream)


def _file_bytes(gguf: GGUFFile, geometry: Geometry, split: Split | None) -> int:
    """Bytes of the file that go to the device."""
    trunk = sum(t.nbytes for t in gguf.tensors.values() if is_trunk(t.name, geometry.layers))
    layers = routed_tensors(gguf, geometry).values()
    slots = [geometry.experts] * len(layers) if split is None else split.slots
    experts = (
        sum(tensor.nbytes for tensor in tensors) * min(count, geometry.experts) // geometry.experts
        for tensors, count in zip(layers, slots, strict=True)
    )
    return trunk + sum(experts)


def _counter(
    gguf: GGUFFile, total: int, on_progress: Callable[[int, int], None] | None
) -> Callable[[Tensor, int], None]:
    """Adds bytes up and tells; what lies on the device as a whole leaves the process's memory."""
    done = 0

    def count(tensor: Tensor, nbytes: int) -> None:
        nonlocal done
        if nbytes == tensor.nbytes:
            gguf.give_back(tensor)
        done = min(done + nbytes, total)
        if on_progress:
            on_progress(done, total)

    return count

"""Using adapters with an opened model: their tensors, changed, in memory in place of the file's.

It goes in two steps, so that plans count what will be there before anything is computed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from localds import _native
from localds.adapters.adapter import AdapterError
from localds.adapters.base import Base
from localds.adapters.merge import patches
from localds.gguf import GGMLType
from localds.memory.plan import is_routed
from localds.memory.trunk import huge_buffer
from localds.ops.tensors import check_tensor, row_stride

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from localds.adapters.adapter import Adapter, Floats
    from localds.adapters.merge import Patch
    from localds.gguf import GGUFFile, Tensor

FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_BLOCK_BYTES = 32 << 20
_ALIGNMENT = 64


def apply(gguf: GGUFFile, adapters: Sequence[tuple[Adapter, float]]) -> Applied:
    """Put room for the adapted tensors in place of the file's, to be filled by `Applied.fill`.

    Adapters add up, each changed by its strength. Plain floats keep their type, all else becomes
    Q8_0. Raises `AdapterError` for an adapter that does not fit the model.
    """
    base = Base.of(gguf)
    found = patches(base, adapters)
    tensors = {name: gguf.tensors[name] for name in found}
    types = {name: _merged_type(tensor) for name, tensor in tensors.items()}
    sizes = {
        name: tensor.n_elements // types[name].block_elements * types[name].block_bytes
        for name, tensor in tensors.items()
    }
    room = huge_buffer(sum(_aligned(size) for size in sizes.values()))
    start = 0
    for name, tensor in tensors.items():
        data = room[start : start + sizes[name]]
        start += _aligned(sizes[name])
        gguf.tensors[name] = replace(tensor, type=types[name], data=data)
    return Applied(gguf, tensors, found, adapters)


class Applied:
    """The adapters that a model runs with.

    `active` are their names and strengths, `base` the tensors as they lie in the file, by name.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        base: Mapping[str, Tensor],
        found: Mapping[str, Patch],
        adapters: Sequence[tuple[Adapter, float]],
    ) -> None:
        self.base = base
        self.active = tuple((adapter.name, strength) for adapter, strength in adapters)
        self._gguf = gguf
        self._patches = found
        self._adapters = adapters
        self._filled = False

    @cached_property
    def digest(self) -> str:
        """Tells these adapters with these strengths from all others, in hex."""
        facts = (f"{adapter.digest()} {strength!r}" for adapter, strength in self._adapters)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def check_resident(self) -> None:
        """Raise `AdapterError` where experts are adapted, for a model that reads them from disk."""
        experts = next((name for name in self.base if is_routed(name)), None)
        if experts:
            raise AdapterError(
                f"the adapter changes routed experts ({experts}), which must all lie in memory "
                "then, and here they are read from the file as they are needed: give more memory "
                "(--ram), or merge it: localds convert MODEL --merge ADAPTER"
            )

    def fill(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compute the adapted tensors, once; `on_progress(done, total)` counts the file's bytes.

        Raises `AdapterError` for values that their type cannot hold, `ReadError`, an `OSError`,
        where the file cannot be read.
        """
        if self._filled:
            return
        total = sum(tensor.nbytes for tensor in self.base.values())
        done = 0
        for name, tensor in self.base.items():
            with tensor.path.open("rb", buffering=0) as file:
                for start, stop in self._blocks(tensor):
                    self._fill_rows(file.fileno(), tensor, self._gguf.tensors[name], start, stop)
                    done += (stop - start) * row_stride(tensor)
                    if on_progress:
                        on_progress(done, total)
                if hasattr(os, "posix_fadvise"):
                    # It is not used again, and the budget leaves no room for it.
                    advice = os.POSIX_FADV_DONTNEED
                    os.posix_fadvise(file.fileno(), tensor.offset, tensor.nbytes, advice)
        self._filled = True
        # Pairs of experts take gigabytes; their digest is all that is still wanted.
        self.digest  # noqa: B018
        self._adapters, self._patches = (), {}

    def _blocks(self, tensor: Tensor) -> Iterator[tuple[int, int]]:
        """Ranges of rows, counted over all matrices, each within one of these."""
        height = tensor.shape[1] if len(tensor.shape) > 1 else 1
        turned = self._patches[tensor.name].turned
        step = height if turned else max(1, _BLOCK_BYTES // (4 * tensor.shape[0]))
        for matrix in range(tensor.n_elements // (height * tensor.shape[0])):
            for start in range(0, height, step):
                first = matrix * height
                yield first + start, first + min(start + step, height)

    def _fill_rows(self, file: int, base: Tensor, room: Tensor, start: int, stop: int) -> None:
        height = base.shape[1] if len(base.shape) > 1 else 1
        matrix = start // height

        def read(_: int, first: int, last: int) -> Floats:
            return _read_rows(file, base, matrix * height + first, last - first)

        first = start - matrix * height
        values = self._patches[base.name].rows(read, matrix, first, first + stop - start)
        try:
            data = _native.quantize(room.type, np.ascontiguousarray(values))
        except ValueError as error:
            raise AdapterError(
                f"adapter in {base.name}: {error}; the scale is too large, or the adapter damaged"
            ) from None
        begin = start * row_stride(room)
        room.data[begin : begin + data.size] = data.reshape(-1)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _merged_type(tensor: Tensor) -> GGMLType:
    check_tensor(tensor, tensor.shape)
    return tensor.type if tensor.type in FLOATS else GGMLType.Q8_0


def _read_rows(file: int, tensor: Tensor, first: int, rows: int) -> Floats:
    """Rows of a tensor from its file in float32, counted over all matrices."""
    stride = row_stride(tensor)
    raw = os.pread(file, rows * stride, tensor.offset + first * stride)
    if len(raw) < rows * stride:
        raise _native.ReadError(f"{tensor.path}: the file was cut short after it was opened")
    matrix = _native.Matrix(tensor.type, rows, tensor.shape[0], 1, np.frombuffer(raw, np.uint8))
    values: Floats = _native.dequantize(matrix)[0]
    return values

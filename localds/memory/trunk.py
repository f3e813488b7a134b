"""The trunk in memory of its own: everything but the routed experts, read once."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from localds import _native
from localds.gguf.mapping import ask_for_huge_pages
from localds.memory.plan import is_trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from numpy.typing import NDArray

    from localds.gguf import GGUFFile, Tensor

PAGE = 4096
"""Direct reads begin and end at multiples of it."""

_PIECE = 8 << 20
_THREADS = 4


def read_trunk(
    gguf: GGUFFile,
    layers: int,
    on_progress: Callable[[int, int], None] | None = None,
    but: Collection[str] = (),
) -> None:
    """Replace the trunk's tensors, those of the first `layers` layers, by copies in memory.

    Those in `but`, by name, stay: they lie in memory already.

    The copies lie in large pages, from which weights are read faster, and stay out of the system's
    cache: what they take is exactly known. `on_progress(done, total)` counts bytes. Raises
    `ReadError`, an `OSError`, where the file cannot be read.
    """
    trunk = [
        tensor
        for tensor in gguf.tensors.values()
        if is_trunk(tensor.name, layers) and tensor.name not in but
    ]
    buffer = huge_buffer(sum(_room(tensor) for tensor in trunk))
    files = {path: _native.DirectFile(str(path)) for path in {tensor.path for tensor in trunk}}
    total = len(buffer)
    done = start = 0
    with ThreadPoolExecutor(_THREADS) as readers:
        reads = []
        for tensor in trunk:
            room = buffer[start : start + _room(tensor)]
            start += len(room)
            reads += [
                readers.submit(files[tensor.path].read, at, piece)
                for at, piece in _pieces(_down(tensor.offset), room)
            ]
            head = tensor.offset % PAGE
            gguf.tensors[tensor.name] = replace(tensor, data=room[head : head + tensor.nbytes])
        try:
            for read in reads:
                read.result()
                done += _PIECE
                if on_progress:
                    on_progress(min(done, total), total)
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise


def _pieces(offset: int, room: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for at in range(0, len(room), _PIECE):
        yield offset + at, room[at : at + _PIECE]


def _room(tensor: Tensor) -> int:
    """Bytes of the pages that a tensor touches."""
    return _down(tensor.offset + tensor.nbytes + PAGE - 1) - _down(tensor.offset)


def _down(offset: int) -> int:
    return offset // PAGE * PAGE


def huge_buffer(nbytes: int) -> NDArray[np.uint8]:
    """Bytes in large pages, zero until they are written; what is not touched takes no memory."""
    # Shared memory, Python's default, seldom lies in large pages.
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_for_huge_pages(buffer)
    return np.frombuffer(buffer, np.uint8)

"""What tells a model from all others, wherever its file lies and whenever that was written."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from localds.adapters.apply import Applied
    from localds.gguf import GGUFFile, Tensor

_SAMPLE = 4096


def fingerprint(gguf: GGUFFile, applied: Applied | None = None) -> str:
    """A SHA-256 in hex that changes with whatever a token's rows in the cache depend on.

    It is taken over the architecture's metadata, the file's size, and of every tensor its name,
    type, shape and first and last 4 KiB. A change of single values inside a tensor goes unseen.
    With adapters `applied`, tensors count as the file has them, and the adapters besides. Raises
    `OSError` where the file cannot be read.
    """
    tensors = gguf.tensors if applied is None else {**gguf.tensors, **applied.base}
    digest = hashlib.sha256("\n".join(_facts(gguf, tensors)).encode("utf-8", "surrogateescape"))
    if applied is not None:
        digest.update(applied.digest.encode())
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in gguf.paths}
        for tensor in tensors.values():
            size = min(_SAMPLE, tensor.nbytes)
            for at in (tensor.offset, tensor.offset + tensor.nbytes - size):
                digest.update(os.pread(files[tensor.path], size, at))
    return digest.hexdigest()


def _facts(gguf: GGUFFile, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    yield f"{gguf.architecture} {gguf.file_bytes}"
    for key in sorted(gguf.metadata):
        if key.startswith(f"{gguf.architecture}."):
            value = gguf.metadata[key]
            yield f"{key} {value.tolist() if isinstance(value, np.ndarray) else value!r}"
    for name, tensor in tensors.items():
        yield f"{name} {tensor.type.name} {tensor.shape}"


def _open(path: Path, stack: ExitStack) -> int:
    # Not through the map: it lies in large pages, so that each sample would bring in 2 MiB.
    file = stack.enter_context(path.open("rb", buffering=0))
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file.fileno()

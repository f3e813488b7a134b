"""Mapping a file into memory, with an error that says why it cannot be done."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING

import numpy as np

from localds.gguf.error import GGUFError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def map_file(path: Path) -> mmap.mmap:
    """Map the whole file for reading. Raises `GGUFError` where that is not possible."""
    try:
        _check_regular(path)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise GGUFError(f"{path}: no such file; check the path") from error
    except PermissionError as error:
        raise GGUFError(f"{path}: permission denied; make the file readable to you") from error
    except OSError as error:
        raise GGUFError(f"{path}: cannot be opened ({error.strerror}); check the path") from error
    ask_for_huge_pages(mapped)
    return mapped


def ask_for_huge_pages(mapped: mmap.mmap) -> None:
    """Have what comes into memory lie in large pages: reading weights from them is faster.

    Of a file, Linux does so on file systems with large folios; what lies in memory already stays
    as it is.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with suppress(OSError):  # a kernel without them
            mapped.madvise(advice)


def give_back(data: NDArray[np.uint8]) -> None:
    """Take pages of a file's map out of this process's memory; they come again when they are read.

    `data` is a view into what `map_file` gave. Pages that other data lie on, too, stay.
    """
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if not isinstance(mapped, mmap.mmap):
        return
    begin = data.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (begin + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, start, length)


def _check_regular(path: Path) -> None:
    status = path.stat()
    if S_ISDIR(status.st_mode):
        raise GGUFError(f"{path}: this is a folder; name a .gguf file in it")
    if not S_ISREG(status.st_mode):
        raise GGUFError(f"{path}: this is not a regular file; name a .gguf file")
    if status.st_size == 0:
        raise GGUFError(f"{path}: the file is empty; download it again")

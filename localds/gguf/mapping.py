"""Mapping a file into memory, with an error that says why it cannot be done."""

from __future__ import annotations

from mmap import ACCESS_READ, mmap
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from localds.gguf.error import GGUFError


def map_file(path: Path) -> mmap:
    """Map the whole file for reading. Raises `GGUFError` where that is not possible."""
    try:
        _check_regular(path)
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError as error:
        raise GGUFError(f"{path}: no such file; check the path") from error
    except PermissionError as error:
        raise GGUFError(f"{path}: permission denied; make the file readable to you") from error
    except OSError as error:
        raise GGUFError(f"{path}: cannot be opened ({error.strerror}); check the path") from error


def _check_regular(path: Path) -> None:
    status = path.stat()
    if S_ISDIR(status.st_mode):
        raise GGUFError(f"{path}: this is a folder; name a .gguf file in it")
    if not S_ISREG(status.st_mode):
        raise GGUFError(f"{path}: this is not a regular file; name a .gguf file")
    if status.st_size == 0:
        raise GGUFError(f"{path}: the file is empty; download it again")

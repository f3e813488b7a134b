"""Runs the sources of GPU kernels on the CPU, to test them where there is no GPU.

The system's C++ compiler makes a shared library of a kernel; the threads of a block are fibers,
and the lanes of a warp (a SIMD group) are in lockstep at shuffles and barriers. What a source may
use is in lockstep.h; a shim put before a kernel's source builds the kernel's own language on it.

Found out: accesses outside buffers (but for the bytes up to a multiple of 16), accesses that are
not aligned to their type, and barriers and shuffles that not all lanes reach. Between barriers, one
lane runs after the other: of races, only those are found out where the order 0, 1, 2 is wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import shutil
import subprocess
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

COMPILER = shutil.which("c++")
"""Without it, tests must be skipped: `pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)`."""
NO_COMPILER = "needs a C++ compiler, as c++ on the path"

HERE = Path(__file__).parent
OPTIONS = ("-std=c++20", "-O1", "-w", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{HERE}")
ALIGNMENT = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")


class LockstepError(RuntimeError):
    """A kernel that does not compile, or does what a GPU would not allow."""


class Lockstep:
    """The emulator; `folder` keeps what it compiles."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}

    def run(
        self,
        source: str,
        call: str,
        buffers: Sequence[NDArray[np.generic]],
        scalars: Sequence[float] = (),
        *,
        blocks: tuple[int, ...],
        threads: tuple[int, ...],
        warp: int = 32,
    ) -> None:
        """Run `call` in every thread of a grid of `blocks` of `threads` (x, or x, y, or x, y, z).

        `source` is C++ (a shim and the kernel, after lockstep.h); `call` a C++ statement, such as
        "copy(lockstep::buffer<float>(0), lockstep::scalar<int>(0));". `buffers` are contiguous;
        those that are writeable hold what the kernel wrote. A block is whole warps. Raises
        `LockstepError`.
        """
        if math.prod(threads) % warp:
            raise ValueError(f"run: {threads} threads are no whole warps of {warp}")
        for array in buffers:
            if not array.flags.c_contiguous:
                raise ValueError(f"run: a buffer of shape {array.shape} is not contiguous")
        n = len(buffers)
        error = self._library(source, call).lockstep_run(
            (ctypes.c_void_p * n)(*[array.ctypes.data for array in buffers]),
            (ctypes.c_size_t * n)(*[array.nbytes for array in buffers]),
            (ctypes.c_bool * n)(*[array.flags.writeable for array in buffers]),
            n,
            (ctypes.c_double * len(scalars))(*scalars),
            (ctypes.c_uint * 3)(*_three(blocks)),
            (ctypes.c_uint * 3)(*_three(threads)),
            ctypes.c_uint(warp),
        )
        if error:
            raise LockstepError(error.decode())

    def _library(self, source: str, call: str) -> ctypes.CDLL:
        text = f'#include "lockstep.h"\n{source}\nextern "C" void lockstep_kernel() {{ {call} }}\n'
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        if name not in self._libraries:
            file = self._folder / f"{name}.cpp"
            file.write_text(text)
            library = file.with_suffix(".so")
            _compile("-shared", *ALIGNMENT, file, self._scheduler, "-o", library)
            loaded = ctypes.CDLL(str(library))
            loaded.lockstep_run.restype = ctypes.c_char_p
            self._libraries[name] = loaded
        return self._libraries[name]

    @cached_property
    def _scheduler(self) -> Path:
        target = self._folder / "lockstep.o"
        _compile("-c", HERE / "lockstep.cpp", "-o", target)
        return target


def _three(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*sizes, *(1 for _ in range(3 - len(sizes))))


def _compile(*arguments: str | Path) -> None:
    if COMPILER is None:
        raise LockstepError(NO_COMPILER)
    done = subprocess.run([COMPILER, *OPTIONS, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LockstepError(f"the kernel does not compile: {done.stderr}")

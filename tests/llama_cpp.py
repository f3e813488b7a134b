"""llama.cpp's programs, from a build of the user's: quantization, and logits as a reference."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

VARIABLE = "LOCALDS_LLAMA_CPP"
DRIVER_SOURCE = Path(__file__).parent / "interop" / "driver.cpp"
THREADS = "2"


@dataclass(frozen=True)
class LlamaCpp:
    """A build of llama.cpp and our driver, linked to its library."""

    binaries: Path
    driver: Path

    def quantize(
        self, source: Path, target: Path, preset: str, imatrix: Path | None = None
    ) -> Path:
        program = self.binaries / "llama-quantize"
        options: list[str | Path] = [] if imatrix is None else ["--imatrix", imatrix]
        _run([program, "--allow-requantize", *options, source, target, preset, THREADS])
        return target

    def read_text(self, program: str, *options: str | Path, window: int, last: str = "") -> str:
        """Run a program that reads a text in windows; returns what it prints, up to `last`.

        A thread of its own prints, and the program may end with status 0 before that has come to
        the end: it is run again then.
        """
        size = str(window)
        command = [self.binaries / f"llama-{program}", *options, "-c", size, "-b", size]
        for _ in range(10):
            printed = _run([*command, "-t", THREADS])
            if last in printed:
                return printed
        return pytest.fail(f"{program} never printed {last!r}: {printed[-2000:]}")

    def logits(
        self,
        model: Path,
        ids: Sequence[int],
        generate: int,
        n_vocab: int,
        adapter: tuple[Path, float] | None = None,
    ) -> NDArray[np.float32]:
        """Rows of logits for `ids` and a greedy continuation: n_ids + generate - 1 of them.

        An `adapter` is a GGUF file and a scale.
        """
        ids_file, out = model.with_suffix(".ids"), model.with_suffix(".logits")
        np.array(ids, np.int32).tofile(ids_file)
        options = [] if adapter is None else [adapter[0], str(adapter[1])]
        _run([self.driver, model, ids_file, out, str(generate), THREADS, *options])
        rows = np.fromfile(out, np.float32).reshape(-1, n_vocab)
        out.unlink()
        assert len(rows) == len(ids) + generate - 1
        return rows


def find_binaries() -> Path:
    """The folder of llama.cpp's programs. Skips the test if none is named."""
    where = os.environ.get(VARIABLE)
    if not where:
        pytest.skip(f"set {VARIABLE} to the folder that holds llama.cpp's programs")
    binaries = Path(where).resolve()
    if not (binaries / "llama-quantize").exists():
        pytest.fail(f"{VARIABLE} is {where}, but there is no llama-quantize")
    return binaries


def find_library(name: str) -> Path:
    """One of llama.cpp's shared libraries. Skips the test without its programs."""
    return _first(find_binaries(), [name, f"../lib/{name}", f"../src/{name}"])


def find_llama_cpp(folder: Path) -> LlamaCpp:
    """Build the driver in `folder`. Skips the test without the variable or a compiler."""
    binaries = find_binaries()
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler to build the driver of llama.cpp with")
    driver = folder / "driver"
    library = find_library("libllama.so").parent
    includes = {
        _first(binaries, [f"{up}/{sub}include/{header}" for up in ("..", "../..") for sub in subs])
        for header, subs in (("llama.h", [""]), ("ggml.h", ["ggml/", ""]))
    }
    _run(
        [compiler, "-std=c++17", "-O1", DRIVER_SOURCE, "-o", driver]
        + [f"-I{header.parent}" for header in includes]
        + [f"-L{library}", f"-Wl,-rpath,{library}", "-lllama", "-lggml", "-lggml-base"]
    )
    return LlamaCpp(binaries, driver)


def _first(base: Path, candidates: list[str]) -> Path:
    for candidate in candidates:
        if (base / candidate).exists():
            return (base / candidate).resolve()
    return pytest.fail(f"{VARIABLE} is {base}, but none of {candidates} is there")


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        log = done.stderr[-2000:].decode(errors="replace")
        pytest.fail(f"{command[0]} exited with {done.returncode}: {log}")
    return (done.stdout + done.stderr).decode(errors="replace")

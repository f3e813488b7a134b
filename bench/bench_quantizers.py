"""Quantizers alone, beside llama.cpp's: speed, and weighted error as a ratio, on one thread.

    python bench/bench_quantizers.py PATH/libggml-base.so [TYPE ...]

Normal weights [256, 2048], log-normal importance; the best of interleaved runs.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import gguf
import numpy as np

from localds import _native
from localds.gguf import GGMLType

if TYPE_CHECKING:
    from numpy.typing import NDArray

TYPES = [
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "IQ4_NL",
    "MXFP4",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_XS",
]
ROWS, COLUMNS = 256, 2048
ROUNDS = 5


def load(path: str) -> Callable[[str, NDArray[np.float32], NDArray[np.float32] | None], object]:
    library = ctypes.CDLL(path)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    chunk = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    library.ggml_quantize_chunk.argtypes = [*chunk, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(
        name: str, x: NDArray[np.float32], weights: NDArray[np.float32] | None
    ) -> NDArray[np.uint8]:
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        out = np.empty((ROWS, COLUMNS // elements * size), np.uint8)
        importance = None if weights is None else weights.ctypes.data
        kind = int(GGMLType[name])
        library.ggml_quantize_chunk(
            kind, x.ctypes.data, out.ctypes.data, 0, ROWS, COLUMNS, importance
        )
        return out

    return quantize


def error(
    name: str, x: NDArray[np.float32], blocks: object, weights: NDArray[np.float32] | None
) -> float:
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    return float((np.square(x - values) * (1 if weights is None else weights)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("types", nargs="*")
    args = parser.parse_args()
    theirs = load(args.library)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, COLUMNS), np.float32)
    importance = np.exp(rng.standard_normal(COLUMNS) * 1.5).astype(np.float32)
    _native.set_threads(1)
    print(f"{_native.isa()}, one thread, millions of weights per second; error: ours / theirs\n")
    print("| type | localds | llama.cpp | error | with matrix: localds | llama.cpp | error |")
    print("|---|---|---|---|---|---|---|")
    for name in args.types or TYPES:
        cells = []
        for weights in (None, importance):
            best = [np.inf, np.inf]
            for _ in range(ROUNDS):
                started = time.perf_counter()
                a = _native.quantize(int(GGMLType[name]), x, weights)
                middle = time.perf_counter()
                b = theirs(name, x, weights)
                ended = time.perf_counter()
                best = [min(best[0], middle - started), min(best[1], ended - middle)]
            ratio = error(name, x, a, weights) / error(name, x, b, weights)
            speeds = [x.size / seconds / 1e6 for seconds in best]
            cells += [f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", f"{ratio:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

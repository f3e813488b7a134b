"""Speed of the matrix kernels, per type, beside what the processor can do at best.

    python bench/bench_kernels.py [--threads 1,2] [--types Q4_K,Q6_K] [--isa avx2]
                                  [--streamed-mib 1024]

Shapes are those of DeepSeek-V2-Lite: 2048 columns, 1408 where a block has 32 elements (an expert's
down projection). One token: GB/s of weights read, from more memory than the caches hold. 48 and 512
tokens: GMAC/s. Run it on an idle machine; each figure is the best of several runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GType

from localds import _native as native

TYPES = "Q4_K,Q6_K,Q5_0,Q8_0,Q5_K,Q4_0,Q4_1,Q5_1,Q2_K,Q3_K,IQ4_NL,IQ4_XS,MXFP4,F16,BF16,F32"
HALF_OFFSETS = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "MXFP4": []}
BATCHED_ROWS = 1408 * 4
RANDOM_ROWS = 4096


def random_matrix(kind: GType, rows: int, cols: int) -> native.Matrix:
    """Random rows, over and over, with scales of 1 (others make subnormal numbers: slow)."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    few = min(rows, RANDOM_ROWS)
    raw = np.random.default_rng(0).integers(0, 64, (few * cols // elements, size), np.uint8)
    if elements > 1:
        for offset in HALF_OFFSETS.get(kind.name, [0, 2]):
            raw[:, offset : offset + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        if kind is GType.MXFP4:
            raw[:, 0] = 128
    else:
        raw = gguf.quants.quantize(np.ones(few * cols, np.float32), kind)
    data = np.resize(raw.reshape(-1).view(np.uint8), rows * cols // elements * size)
    return native.Matrix(int(kind), rows, cols, 1, data)


def best_seconds(call: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def measure(kind: GType, streamed_bytes: int) -> tuple[float, float, float]:
    """GB/s with one token, GMAC/s with 48 and with 512."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    cols = 1408 if elements == 32 else 2048
    rng = np.random.default_rng(1)
    rows = streamed_bytes * elements // (cols * size)
    streamed = random_matrix(kind, rows, cols)
    token = rng.normal(size=(1, cols)).astype(np.float32)
    read = streamed.nbytes / best_seconds(lambda: native.matmul(streamed, token)) / 1e9
    batched = random_matrix(kind, BATCHED_ROWS, cols)
    rates = []
    for n in (48, 512):
        x = rng.normal(size=(n, cols)).astype(np.float32)
        seconds = best_seconds(lambda x=x: native.matmul(batched, x))
        rates.append(n * BATCHED_ROWS * cols / seconds / 1e9)
    return read, rates[0], rates[1]


def peaks(nbytes: int) -> str:
    best = native.measure_peaks(nbytes)
    rates = f"{best.int8 / 1e9:.0f} int8, {best.floats / 1e9:.0f} float GMAC/s"
    return f"at best: reads {best.read / 1e9:.1f} GB/s, multiplies {rates}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default=f"1,{native.default_threads()}")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--isa", default=native.isa())
    parser.add_argument("--streamed-mib", type=int, default=1024, help="data read by one token")
    args = parser.parse_args()
    streamed = args.streamed_mib << 20
    native.select_isa(args.isa)
    for threads in dict.fromkeys(int(n) for n in args.threads.split(",")):
        native.set_threads(threads)
        print(f"{native.isa()}, {threads} threads; {peaks(streamed)}")
        print(f"{'type':8}{'1 token':>12}{'48 tokens':>16}{'512 tokens':>16}")
        for name in args.types.split(","):
            read, few, many = measure(GType[name], streamed)
            print(f"{name:8}{read:7.1f} GB/s{few:9.0f} GMAC/s{many:9.0f} GMAC/s")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

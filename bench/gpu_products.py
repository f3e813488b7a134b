"""Products of matrices by our kernels, beside MLX's own forms with scales in three types.

The time is of one of many independent products in a graph, over more weights than a cache holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from gpu_report import Report
from gpu_timing import seconds

from localds.gguf import GGMLType
from localds.ops.mlx.backend import Backend
from localds.ops.mlx.repack import has_form, repack
from localds.ops.mlx_device import find_gpu, open_gpu

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Ways = dict[str, Callable[[], Any]]

MATRICES = ((GGMLType.Q4_K, 2048, 2048), (GGMLType.Q4_K, 10944, 2048))
MATRICES += ((GGMLType.Q6_K, 102400, 2048), (GGMLType.Q8_0, 2048, 2816))
STACKS = ((GGMLType.Q4_K, 1408, 2048), (GGMLType.Q5_0, 2048, 1408), (GGMLType.Q8_0, 2048, 1408))
EXPERTS, USED = 64, 6
COPIES_BYTES, MOST_COPIES = 256_000_000, 32
STACK_COPIES = 4
SMALLER = 32
OUR, THEIRS = "ours", (mx.float32, mx.float16, mx.bfloat16)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+")


def run(arguments: argparse.Namespace, report: Report) -> None:
    backend, stream = open_gpu(find_gpu())
    scale = SMALLER if arguments.small else 1
    with mx.stream(stream):
        for m in arguments.tokens or ([1] if arguments.small else [1, 512]):
            for kind, rows, columns in MATRICES:
                name = f"{kind.name} {rows // scale} x {columns}, {m} tokens"
                work = partial(measure_matrix, backend, kind, rows // scale, columns, m)
                report.guarded(name, partial(work, report, name))
            for kind, rows, columns in STACKS:
                name = f"{USED} of {EXPERTS} {kind.name} {rows // scale} x {columns}, {m} tokens"
                work = partial(measure_stack, backend, kind, rows // scale, columns, m)
                report.guarded(name, partial(work, report, name))


def measure_matrix(
    backend: Backend, kind: GGMLType, rows: int, columns: int, m: int, report: Report, name: str
) -> None:
    blocks = random_blocks(kind, rows, columns)
    copies = min(COPIES_BYTES // blocks.nbytes + 1, MOST_COPIES if rows > 1024 else 2)
    x = mx.random.normal((m, columns))
    ours = [backend.load(kind, blocks) for _ in range(copies)]
    ways: Ways = {OUR: lambda: [matrix(x) for matrix in ours]}
    for dtype, (stacks, options) in their_forms(kind, blocks, copies).items():
        ways[their_name(dtype)] = partial(multiply_theirs, stacks, x.astype(dtype), options)
    tell(report, name, ways, copies, blocks.nbytes, m * rows * columns)


def measure_stack(
    backend: Backend, kind: GGMLType, rows: int, columns: int, m: int, report: Report, name: str
) -> None:
    blocks = random_blocks(kind, EXPERTS, rows, columns)
    copies = STACK_COPIES
    ids = np.sort(np.random.default_rng(1).integers(0, EXPERTS, m * USED))
    if m == 1:
        ids = np.arange(0, USED * 10, 10)
    chosen = mx.array(ids.astype(np.uint32))
    read = blocks.nbytes * len(np.unique(ids)) // EXPERTS
    x = mx.random.normal((m * USED, columns))
    ours = [backend.load(kind, blocks) for _ in range(copies)]
    ways: Ways = {OUR: lambda: [matrix.chosen(x, chosen) for matrix in ours]}
    for dtype, (stacks, options) in their_forms(kind, blocks, copies).items():
        # A sorted product of x[:, None] as a view is wrong in MLX 0.32 (its issue 4253).
        rows_of_x = mx.contiguous(x.astype(dtype)[:, None])
        ways[their_name(dtype)] = partial(gather_theirs, stacks, rows_of_x, chosen, options)
    tell(report, name, ways, copies, read, len(ids) * rows * columns)


def tell(report: Report, name: str, ways: Ways, copies: int, read: int, products: int) -> None:
    for way, work in ways.items():
        took = seconds(work, runs=5) / copies
        note = f"{read / took / 1e9:.0f} GB/s of the file's bytes"
        note += f", {2 * products / took / 1e12:.2f} TFLOP/s"
        report.figure(f"{name}, {way}", took * 1e6, "us", note)


def their_forms(kind: GGMLType, blocks: Bytes, copies: int) -> dict[str, Any]:
    """Words, scales and biases of MLX's own form, by the type of the scales; none for some."""
    forms: dict[str, Any] = {}
    if not has_form(kind) or kind is GGMLType.MXFP4:
        return forms
    packed = repack(kind, mx.array(blocks))
    for dtype in THEIRS:
        scales, biases = packed.scales.astype(dtype), packed.biases.astype(dtype)
        stacks = [
            (packed.words + mx.array(0, mx.uint32), scales + 0, biases + 0) for _ in range(copies)
        ]
        mx.eval(stacks)
        forms[dtype] = stacks, {"group_size": 32, "bits": packed.bits}
    return forms


def multiply_theirs(stacks: Any, x: mx.array, options: dict[str, int]) -> list[mx.array]:
    return [mx.quantized_matmul(x, *stack, **options) for stack in stacks]


def gather_theirs(
    stacks: Any, x: mx.array, chosen: mx.array, options: dict[str, int]
) -> list[mx.array]:
    return [
        mx.gather_qmm(x, *stack, rhs_indices=chosen, sorted_indices=True, **options)
        for stack in stacks
    ]


def their_name(dtype: mx.Dtype) -> str:
    return f"MLX, {str(dtype).removeprefix('mlx.core.')}"


def random_blocks(kind: GGMLType, *shape: int) -> Bytes:
    """Blocks [..., rows, bytes] whose float16 scales are small and finite."""
    *lead, columns = shape
    size = columns // kind.block_elements * kind.block_bytes
    data = np.random.default_rng(0).integers(0, 256, (*lead, size), dtype=np.uint8)
    high_bytes = {GGMLType.Q4_K: (1, 3), GGMLType.Q6_K: (209,)}
    for at in high_bytes.get(kind, (1,)):
        data.reshape(-1, kind.block_bytes)[:, at] = 0x10
    return data

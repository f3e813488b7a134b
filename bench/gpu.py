"""Measure the GPU path through MLX: products of matrices, a whole model, and mlx-lm beside it.

usage: python bench/gpu.py facts
       python bench/gpu.py parity FILE.gguf...               beside MLX's operations on the CPU
       python bench/gpu.py products [--small]
       python bench/gpu.py model FILE.gguf [--chunk 2048] [--depth 8192] [--tokens 64]
       python bench/gpu.py peer [--group 64] [--small]      mlx-lm, V2-Lite geometry, random weights
       python bench/gpu.py profile FILE.gguf                kernels of decode steps (needs torch)

Times are medians. --cpu runs on MLX's CPU device, to see that the script works.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localds.ops.mlx_device import gpu_backend

if TYPE_CHECKING:
    from collections.abc import Callable

BACKEND = gpu_backend() if "--cpu" not in sys.argv else None  # sets MLX up before its import

import mlx.core as mx  # noqa: E402

from localds.gguf import GGMLType, GGUFFile  # noqa: E402
from localds.memory.latents import LatentCache  # noqa: E402
from localds.ops.mlx import build_decoder  # noqa: E402
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.repack import has_form, repack  # noqa: E402

V2_LITE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "greedy",
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "beta_fast": 32,
        "beta_slow": 1,
        "type": "yarn",
    },
}
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("facts").set_defaults(run=facts)
    parity = commands.add_parser("parity")
    parity.set_defaults(run=check_parity)
    parity.add_argument("files", type=Path, nargs="+")
    products = commands.add_parser("products")
    products.set_defaults(run=measure_products)
    products.add_argument("--small", action="store_true")
    model = commands.add_parser("model")
    model.set_defaults(run=measure_model)
    model.add_argument("file", type=Path)
    model.add_argument("--chunk", type=int, default=2048)
    model.add_argument("--depth", type=int, default=8192)
    model.add_argument("--tokens", type=int, default=64)
    model.add_argument("--decode-only", action="store_true")
    peer = commands.add_parser("peer")
    peer.set_defaults(run=measure_peer)
    peer.add_argument("--group", type=int, default=64)
    peer.add_argument("--small", action="store_true")
    peer.add_argument("--depth", type=int, default=8192)
    peer.add_argument("--tokens", type=int, default=64)
    profiled = commands.add_parser("profile")
    profiled.set_defaults(run=profile)
    profiled.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.cpu:
        mx.set_default_device(mx.cpu)
    arguments.run(arguments)


def say(text: str) -> None:
    print(text, flush=True)


def facts(_: argparse.Namespace) -> None:
    say(f"mlx {mx.__version__}, {mx.default_device()}, {mx.device_info()}")
    x = mx.random.normal((4096, 4096)).astype(mx.float16)
    small = mx.random.normal((8, 8))
    say(f"product of 4096: {seconds(lambda: x @ x) * 1e3:.3f} ms")
    big = mx.zeros((1 << 28,), mx.float32)
    took = seconds(lambda: big + 1)
    say(f"reading and writing 2 GiB: {2 * big.nbytes / took / 1e9:.0f} GB/s")

    def chain(n: int) -> mx.array:
        y = small
        for _ in range(n):
            y = y @ small
        return y

    one, many = seconds(partial(chain, 100)), seconds(partial(chain, 1100))
    say(f"a small product in a chain: {(many - one) * 1e3:.2f} us")


def seconds(work: Callable[[], Any], runs: int = 7) -> float:
    """Median time of `work`, whose result is waited for, after one run to warm up."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# ---- parity ----


def check_parity(arguments: argparse.Namespace) -> None:
    """Logits of a long piece, a short one, and single tokens; those expected may lie in an .npz."""
    for path in arguments.files:
        guarded(partial(parity_lines, path))


def parity_lines(path: Path) -> None:
    stored = path.with_suffix(".npz")
    if stored.exists():
        with np.load(stored) as arrays:
            ids, expected = arrays["ids"].astype(np.int32), arrays["logits"]
    else:
        with GGUFFile.open(path) as file:
            vocabulary = file.tensors["token_embd.weight"].shape[1]
        ids = np.random.default_rng(0).integers(2, vocabulary, 72).astype(np.int32)
        device = mx.default_device()
        mx.set_default_device(mx.cpu)
        expected = all_logits(path, ids, PORTABLE)
        mx.set_default_device(device)
    logits = all_logits(path, ids, BACKEND or PORTABLE)
    long, short = slice(0, len(ids) - 24), slice(len(ids) - 24, None)
    for name, part in {"at once": long, "few and single": short}.items():
        worst = np.abs(logits[part] - expected[part]).max() / np.abs(expected).max()
        same = (logits[part].argmax(1) == expected[part].argmax(1)).mean()
        say(
            f"{path.stem:28} {name:15} worst logit off by {worst:.1e}, "
            f"KL {mean_kl(expected[part], logits[part]):.1e}, same best token {same:.1%}"
        )


def all_logits(path: Path, ids: np.ndarray[Any, Any], backend: Any) -> np.ndarray[Any, Any]:
    with GGUFFile.open(path) as file:
        decoder = build_decoder(file, backend)
    g = decoder.geometry
    rows = LatentCache(g.layers, g.cache_width, len(ids), "f32")
    ends = [len(ids) - 24, len(ids) - 18, *range(len(ids) - 17, len(ids) + 1)]
    starts = [0, *ends[:-1]]
    parts = [
        decoder.forward(ids[start:end], rows, last_only=False)
        for start, end in zip(starts, ends, strict=True)
    ]
    return np.concatenate(parts)


def mean_kl(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    def logs(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = logs(reference), logs(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


# ---- products ----


def random_blocks(kind: GGMLType, *shape: int) -> np.ndarray[Any, Any]:
    """Blocks [..., rows, bytes] whose float16 scales are small and finite."""
    *lead, columns = shape
    size = columns // kind.block_elements * kind.block_bytes
    data = np.random.default_rng(0).integers(0, 256, (*lead, size), dtype=np.uint8)
    blocks = data.reshape(-1, kind.block_bytes)
    halves = {GGMLType.Q4_K: (1, 3), GGMLType.Q6_K: (209,), GGMLType.MXFP4: (0,)}
    for at in halves.get(kind, (1,)):
        blocks[:, at] = 0x10 if kind is not GGMLType.MXFP4 else 110
    return data


def measure_products(arguments: argparse.Namespace) -> None:
    """Time of one of many independent products in a graph, over more weights than a cache holds."""
    scale = 8 if arguments.small else 1
    shapes = [
        (GGMLType.Q4_K, 2048 // scale, 2048),
        (GGMLType.Q4_K, 10944 // scale, 2048),
        (GGMLType.Q6_K, 102400 // scale, 2048),
        (GGMLType.Q8_0, 2048 // scale, 2816),
    ]
    experts = [
        (GGMLType.Q4_K, 1408 // scale, 2048),
        (GGMLType.Q5_0, 2048 // scale, 1408),
        (GGMLType.Q8_0, 2048 // scale, 1408),
    ]
    for m in (1, 512):
        for shape in shapes:
            guarded(partial(product_line, *shape, m))
        for shape in experts:
            guarded(partial(expert_line, *shape, m))


def guarded(work: Callable[[], Any]) -> None:
    """Run it; a failure is told and does not end the rest."""
    try:
        work()
    except Exception as error:
        say(f"FAILED: {type(error).__name__}: {str(error)[:600]}")


def forms(kind: GGMLType, blocks: np.ndarray[Any, Any], copies: int) -> dict[str, Any]:
    """Ways to multiply: by our matrix, and by MLX's own form with scales in three types."""
    backend = BACKEND or PORTABLE
    ours = [backend.load(kind, blocks) for _ in range(copies)]
    result: dict[str, Any] = {"ours": (ours, mx.float32)}
    if has_form(kind) and kind is not GGMLType.MXFP4:
        packed = repack(kind, mx.array(blocks))
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            scales, biases = packed.scales.astype(dtype), packed.biases.astype(dtype)
            made = [
                (packed.words + mx.array(0, mx.uint32), scales + 0, biases + 0)
                for _ in range(copies)
            ]
            mx.eval(made)
            result[f"mlx {dtype}".replace("mlx.core.", "")] = ((made, packed.bits), dtype)
    return result


def product_line(kind: GGMLType, rows: int, columns: int, m: int) -> None:
    blocks = random_blocks(kind, rows, columns)
    copies = max(min(256_000_000 // blocks.nbytes, 32), 2)
    x32 = mx.random.normal((m, columns))
    for name, (weights, dtype) in forms(kind, blocks, copies).items():
        x = x32.astype(dtype)
        mx.eval(x)
        if name == "ours":
            work = lambda: [w(x) for w in weights]  # noqa: B023, E731
        else:
            arrays, bits = weights
            work = lambda: [  # noqa: E731
                mx.quantized_matmul(x, *a, group_size=32, bits=bits)  # noqa: B023
                for a in arrays  # noqa: B023
            ]
        took = seconds(work) / copies
        report(
            f"{kind.name} {rows}x{columns} m={m} {name}", took, blocks.nbytes, m * rows * columns
        )


def expert_line(kind: GGMLType, rows: int, columns: int, m: int, experts: int = 64) -> None:
    blocks = random_blocks(kind, experts, rows, columns)
    copies = 4
    ids = np.sort(np.random.default_rng(1).integers(0, experts, (m, 6)).reshape(-1))
    if m == 1:
        ids = np.arange(0, 60, 10)
    chosen = mx.array(ids.astype(np.uint32))
    read = blocks.nbytes * len(set(ids.tolist())) // experts
    x32 = mx.random.normal((m * 6, columns))
    for name, (weights, dtype) in forms(kind, blocks, copies).items():
        x = x32.astype(dtype)
        mx.eval(x)
        if name == "ours":
            work = lambda: [w.chosen(x, chosen) for w in weights]  # noqa: B023, E731
        else:
            arrays, bits = weights
            work = lambda: [  # noqa: E731
                mx.gather_qmm(
                    x[:, None],  # noqa: B023
                    *a,
                    rhs_indices=chosen,
                    group_size=32,
                    bits=bits,  # noqa: B023
                    sorted_indices=True,
                )
                for a in arrays  # noqa: B023
            ]
        took = seconds(work, runs=5) / copies
        report(
            f"{kind.name} {experts}x{rows}x{columns} m={m}x6 {name}",
            took,
            read,
            6 * m * rows * columns,
        )


def report(what: str, took: float, read: int, products: int) -> None:
    say(
        f"{what:52} {took * 1e6:9.1f} us {read / took / 1e9:7.0f} GB/s of the file's bytes "
        f"{2 * products / took / 1e12:7.2f} TFLOP/s"
    )


# ---- models ----


def measure_model(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    with GGUFFile.open(arguments.file) as file:
        decoder = build_decoder(file, BACKEND or PORTABLE)
        size = file.file_bytes
    took = time.perf_counter() - started
    say(f"load: {took:.1f} s, {size / took / 1e9:.2f} GB/s; file {size / 1e9:.2f} GB")
    say(f"memory: {mx.get_active_memory() / 1e9:.2f} GB, peak {mx.get_peak_memory() / 1e9:.2f} GB")
    g = decoder.geometry
    ids = np.random.default_rng(0).integers(2, g.vocabulary, arguments.depth).astype(np.int32)

    def cache() -> LatentCache:
        return LatentCache(g.layers, g.cache_width, arguments.depth + 4 * arguments.tokens, "f16")

    def prefill(n: int, rows: LatentCache) -> float:
        started = time.perf_counter()
        for start in range(0, n, arguments.chunk):
            decoder.forward(ids[start : min(start + arguments.chunk, n)], rows)
        return n / (time.perf_counter() - started)

    compare_pieces(decoder, ids[:24])
    if arguments.decode_only:
        rows = cache()
        prefill(8, rows)
        decode_lines(decoder, rows, arguments.tokens, 8)
        return
    mx.reset_peak_memory()
    guarded(lambda: say(f"first prefill 512: {prefill(512, cache()):.0f} tokens/s (compiles)"))
    speeds = [prefill(512, cache()) for _ in range(5)]
    say(f"prefill 512: {statistics.median(speeds):.0f} tokens/s {spread(speeds)}")
    speeds = [prefill(arguments.depth, cache()) for _ in range(2)]
    whole = f"prefill {arguments.depth} by {arguments.chunk}"
    say(f"{whole}: {max(speeds):.0f} tokens/s {spread(speeds)}")
    say(f"peak with prefill {mx.get_peak_memory() / 1e9:.2f} GB")
    mx.clear_cache()
    for depth in (8, arguments.depth):
        rows = cache()
        prefill(depth, rows)
        guarded(partial(decode_lines, decoder, rows, arguments.tokens, depth))


def compare_pieces(decoder: Any, ids: np.ndarray[Any, Any]) -> None:
    """The same tokens at once, which rounds to float16, and one by one."""
    g = decoder.geometry
    rows = [LatentCache(g.layers, g.cache_width, len(ids), "f16") for _ in range(2)]
    together = decoder.forward(ids, rows[0], last_only=False)
    single = np.concatenate([decoder.forward(ids[i : i + 1], rows[1]) for i in range(len(ids))])
    worst = np.abs(single - together).max() / np.abs(single).max()
    say(f"at once and one by one: off by {worst:.1e}, KL {mean_kl(single, together):.1e}")


def decode_lines(decoder: Any, rows: LatentCache, tokens: int, depth: int) -> None:
    """Decoding with the logits on the host each time, and with the next step begun before."""
    decoder.forward(np.array([5], np.int32), rows)
    length = rows.length
    waited, ahead, built = [], [], []
    for _ in range(3):
        rows.length = length
        started = time.perf_counter()
        token = 5
        for _ in range(tokens):
            token = int(decoder.forward(np.array([token], np.int32), rows)[0].argmax())
        waited.append(tokens / (time.perf_counter() - started))
        rows.length = length
        started = time.perf_counter()
        run_ahead(decoder, rows, tokens, built)
        ahead.append(tokens / (time.perf_counter() - started))
    say(
        f"decode {tokens} at {depth}: {statistics.median(waited):.1f} tokens/s {spread(waited)} "
        f"through forward; {statistics.median(ahead):.1f} {spread(ahead)} with the next step begun "
        f"first; building a step takes {statistics.median(built) * 1e3:.2f} ms"
    )


def run_ahead(decoder: Any, rows: LatentCache, tokens: int, built: list[float]) -> None:
    ids = mx.array([5], mx.int32)
    for _ in range(tokens):
        started = time.perf_counter()
        following = mx.argmax(decoder.step(ids, rows), axis=-1).astype(mx.int32)
        rows.extend(1)
        built.append(time.perf_counter() - started)
        mx.async_eval(following)
        ids.item()
        ids = following
    mx.eval(ids)


def spread(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.0f}" for value in values) + ")"


def measure_peer(arguments: argparse.Namespace) -> None:
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.generate import generate_step
    from mlx_lm.models import cache, deepseek_v2

    config = V2_LITE | (SMALL if arguments.small else {})
    model = deepseek_v2.Model(deepseek_v2.ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=arguments.group, bits=4)
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)
    mx.clear_cache()
    ids = mx.array(np.random.default_rng(0).integers(2, config["vocab_size"], arguments.depth))
    say(f"mlx-lm, groups of {arguments.group}: {mx.get_active_memory() / 1e9:.2f} GB")

    def prefill(n: int) -> tuple[float, Any]:
        rows = cache.make_prompt_cache(model)
        started = time.perf_counter()
        for start in range(0, n, 2048):
            logits = model(ids[None, start : min(start + 2048, n)], cache=rows)
            mx.eval(logits[:, -1], [row.state for row in rows])
        return n / (time.perf_counter() - started), rows

    def decode(depth: int, rows: Any) -> None:
        speeds = []
        for _ in range(3):
            steps = generate_step(
                ids[:1], model, max_tokens=arguments.tokens + 1, prompt_cache=rows
            )
            next(steps)
            started = time.perf_counter()
            count = sum(1 for _ in steps)
            speeds.append(count / (time.perf_counter() - started))
        say(f"mlx-lm decode at {depth}: {statistics.median(speeds):.1f} tokens/s {spread(speeds)}")

    decode(0, cache.make_prompt_cache(model))
    for n in (512, arguments.depth):
        say(f"mlx-lm first prefill {n}: {prefill(n)[0]:.0f} tokens/s (compiles)")
        speeds = [prefill(n)[0] for _ in range(2)]
        say(f"mlx-lm prefill {n}: {max(speeds):.0f} tokens/s {spread(speeds)}")
    decode(arguments.depth, prefill(arguments.depth)[1])
    say(f"mlx-lm peak {mx.get_peak_memory() / 1e9:.2f} GB")


def profile(arguments: argparse.Namespace) -> None:
    import torch

    with GGUFFile.open(arguments.file) as file:
        decoder = build_decoder(file, BACKEND or PORTABLE)
    g = decoder.geometry
    rows = LatentCache(g.layers, g.cache_width, 4096, "f16")
    decoder.forward(np.arange(5, 13, dtype=np.int32), rows)
    decoder.forward(np.array([5], np.int32), rows)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ids = np.random.default_rng(0).integers(2, g.vocabulary, 512).astype(np.int32)
    for name, work in {
        "8 decode steps": lambda: run_ahead(decoder, rows, 8, []),
        "prefill 512": lambda: decoder.forward(ids, rows),
    }.items():
        work()
        with torch.profiler.profile(activities=activities) as recorded:
            work()
        say(f"==== {name}")
        table = recorded.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=70
        )
        say("\n".join(line[:70] + line[-75:] for line in table.splitlines()))


if __name__ == "__main__":
    main()

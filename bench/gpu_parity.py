"""Logits of models on the GPU beside those of MLX's operations on the CPU, or of an .npz.

Each model runs in three ways: all on the GPU; half of each layer's experts there and the others on
the CPU; and the others brought to the GPU. A long piece is computed at once, then a few tokens,
then single ones. The .npz beside a model holds `ids` and the `logits` that are expected.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gpu_report import Report

from localds import models
from localds.gguf import GGUFFile
from localds.ops.cpu import CpuOps
from localds.ops.mlx import build_decoder
from localds.ops.mlx.backend import PORTABLE
from localds.ops.mlx.splitting import Split
from localds.ops.mlx_device import Gpu, find_gpu, open_gpu

BOUND = 1e-3
"""KL from the expected logits: many tokens at once multiply in float16 on a GPU."""
ROUNDED = 2e-2
"""The same where the CPU computes experts: it rounds what it multiplies to 8 bits."""

TOKENS = 72
SINGLE, FEW = 18, 6

Logits = np.ndarray[Any, np.dtype[np.float32]]
Divergences = dict[str, list[float]]
WAYS = {"all on the GPU": None, "half on the CPU": None, "half brought to the GPU": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", help="models, or folders of them")
    parser.add_argument("--cache-type", default="f32")


def run(arguments: argparse.Namespace, report: Report) -> None:
    gpu = find_gpu()
    divergences: Divergences = defaultdict(list)
    for path in arguments.files:
        for file in sorted(path.glob("*.gguf")) if path.is_dir() else [path]:
            work = partial(check, file, gpu, arguments.cache_type, report, divergences)
            report.guarded(f"parity of {file.stem}", work)
    for way, of in divergences.items():
        report.figure(f"largest KL, {way}", max(of), "", f"of {len(of)} models")


def check(path: Path, gpu: Gpu, cache_type: str, report: Report, divergences: Divergences) -> None:
    ids, expected = expected_logits(path, cache_type)
    with GGUFFile.open(path) as gguf:
        geometry = models.read_geometry(gguf)
    for way, stream_from in WAYS.items():
        split = None
        if way != "all on the GPU":
            if not geometry.moe_layers:
                continue
            split = halves(gpu, geometry.moe_layers, geometry.experts, stream_from)
        logits = all_logits(path, ids, *open_gpu(gpu), split=split, cache_type=cache_type)
        bound = ROUNDED if way == "half on the CPU" else BOUND
        kl = tell(f"{path.stem}, {way}", logits, expected, bound, report)
        divergences[way].append(kl)


def tell(what: str, logits: Logits, expected: Logits, bound: float, report: Report) -> float:
    """The larger KL of both parts."""
    parts = {"at once": slice(0, -SINGLE - FEW), "few and single": slice(-SINGLE - FEW, None)}
    kl = max(mean_kl(expected[part], logits[part]) for part in parts.values())
    same = (logits.argmax(1) == expected.argmax(1)).mean()
    worst = {
        name: np.abs(logits[part] - expected[part]).max() / np.abs(expected).max()
        for name, part in parts.items()
    }
    note = ", ".join(f"{name} off by {off:.1e}" for name, off in worst.items())
    report.figure(f"KL of {what}", kl, "", f"same best token {same:.1%}, {note}", detail=True)
    if not kl <= bound:  # nor what is no number
        report.fail(what, f"KL {kl:.1e} is above {bound:.0e}")
    return kl


def expected_logits(path: Path, cache_type: str) -> tuple[np.ndarray[Any, Any], Logits]:
    stored = path.with_suffix(".npz")
    if stored.exists() and cache_type == "f32":
        with np.load(stored) as arrays:
            return arrays["ids"].astype(np.int32), arrays["logits"]
    with GGUFFile.open(path) as gguf:
        vocabulary = models.read_geometry(gguf).vocabulary
    ids = np.random.default_rng(0).integers(2, vocabulary, TOKENS).astype(np.int32)
    stream = mx.new_thread_unsafe_stream(mx.cpu)
    return ids, all_logits(path, ids, PORTABLE, stream, split=None, cache_type=cache_type)


def halves(gpu: Gpu, layers: int, experts: int, stream_from: int | None) -> Split:
    return Split(
        backend=open_gpu(gpu)[0],
        slots=[experts // 2] * layers,
        cpu=CpuOps(),
        staging_bytes=1 << 20,
        stream_from=stream_from,
        adopt=False,
    )


def all_logits(
    path: Path,
    ids: np.ndarray[Any, Any],
    backend: Any,
    stream: mx.Stream,
    *,
    split: Split | None,
    cache_type: str,
) -> Logits:
    """Logits [n, n_vocab]: most tokens at once, then a few, then one by one."""
    with GGUFFile.open(path) as gguf:
        decoder = build_decoder(gguf, backend, stream, split)
        cache = decoder.new_cache(len(ids), cache_type)
        n = len(ids)
        ends = [n - SINGLE - FEW, *range(n - SINGLE, n + 1)]
        logits = [
            decoder.forward(ids[start:end], cache, last_only=False)
            for start, end in pairwise([0, *ends])
        ]
    if split is not None:
        split.stager.close()
    return np.concatenate(logits)


def mean_kl(reference: Logits, other: Logits) -> float:
    """Mean over tokens of the divergence of `other`'s distribution from `reference`'s."""

    def logs(logits: Logits) -> np.ndarray[Any, Any]:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = logs(reference), logs(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())

"""A model on the GPU, and timed passes through it."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gpu_report import Report
from gpu_vram import used_vram

import localds
from localds.memory.speeds import speeds_for
from localds.model import Model
from localds.ops.mlx_device import find_gpu
from localds.sampling import Sampler, SamplingParams

CHUNK = 1024
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """Tokens of a short and of a long prompt, tokens to generate, and runs of each measurement."""

    short: int = 512
    long: int = 8192
    tokens: int = 64
    rounds: int = 3


SMALL = Sizes(short=32, long=64, tokens=4, rounds=2)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--chunk", type=int, default=CHUNK, help="prompt tokens at once")


def sizes(arguments: argparse.Namespace) -> Sizes:
    return SMALL if arguments.small else Sizes()


def load(arguments: argparse.Namespace, report: Report, context: int, **options: Any) -> Model:
    """The model with room for `context` tokens; tells how long that took."""
    chunk = min(arguments.chunk, context)
    started = time.perf_counter()
    model = localds.load(
        arguments.file,
        device="gpu",
        context=context,
        chunk=chunk,
        on_note=report.say,
        **options,
    )
    took = time.perf_counter() - started
    report.figure("load", took, "s", f"file of {model.gguf.file_bytes / GB:.2f} GB")
    return model


class Memory:
    """What the GPU's memory held since this was made, beside what the planner expected.

    The machine's speeds are measured before, if they are not known: that takes memory, too.
    """

    def __init__(self, file: Path) -> None:
        self._used = used_vram()  # before MLX begins to compute
        speeds_for(find_gpu(), [file])
        mx.clear_cache()
        mx.reset_peak_memory()

    def tell(self, model: Model, report: Report, when: str) -> None:
        placement = model.on_gpu.placement
        plan, peak = placement.total, mx.get_peak_memory()
        parts = ("weights", "pool", "cache", "scratch", "staging")
        note = ", ".join(f"{part} {getattr(placement, part) / GB:.2f}" for part in parts)
        report.figure(f"memory planned, {when}", plan / GB, "GB", note)
        report.figure(f"memory at most, {when}", peak / GB, "GB", f"{peak / plan:.1%} of the plan")
        used = used_vram()
        if used is not None and self._used is not None:
            taken = used - self._used
            note = f"as the driver says, with what MLX keeps: {taken / plan:.1%} of the plan"
            report.figure(f"memory taken, {when}", taken / GB, "GB", note)


class Runs:
    """Passes through a model with a cache of their own. Speeds are in tokens a second."""

    def __init__(self, model: Model, context: int, chunk: int, cache_type: str = "f16") -> None:
        self._decoder = model.decoder
        self._vocabulary = model.geometry.vocabulary
        self._chunk = chunk
        self.cache = model.decoder.new_cache(context, cache_type)

    def ids(self, count: int) -> np.ndarray[Any, Any]:
        """Arbitrary tokens spread over the vocabulary, the same on every run."""
        return ((7919 * np.arange(count) + 11) % self._vocabulary).astype(np.int32)

    def prefill(self, count: int) -> float:
        """Speed of reading `count` more tokens."""
        ids = self.ids(count)
        started = time.perf_counter()
        for start in range(0, count, self._chunk):
            self._decoder.forward(ids[start : start + self._chunk], self.cache)
        return count / (time.perf_counter() - started)

    def fresh_prefill(self, count: int) -> float:
        """Speed of reading `count` tokens into an empty cache."""
        self.cache.truncate(0)
        return self.prefill(count)

    def to_depth(self, depth: int) -> None:
        """Have `depth` tokens in the cache: computed if there are fewer."""
        self.cache.truncate(min(depth, self.cache.length))
        if self.cache.length < depth:
            self.prefill(depth - self.cache.length)

    def fill(self, depth: int) -> None:
        """Have `depth` tokens in the cache without computing: the rows there are, repeated."""
        length = self.cache.length
        self.cache.rows(0, length)  # brings them to the host
        for layer in self.cache.layers:
            for start in range(length, depth, length):
                stop = min(start + length, depth)
                layer.data[start:stop] = layer.data[: stop - start]
        self.cache.extend(depth - length)

    def decode(self, depth: int, count: int) -> float:
        """Speed of tokens one by one, each waited for."""
        self.to_depth(depth)
        ids = self.ids(count)
        started = time.perf_counter()
        for index in range(count):
            self._decoder.forward(ids[index : index + 1], self.cache)
        return count / (time.perf_counter() - started)

    def decode_ahead(self, depth: int, count: int) -> float:
        """Speed of tokens chosen on the GPU, the next step begun before the last is read."""
        self.to_depth(depth)
        logits = self._decoder.forward(self.ids(1), self.cache)[0]
        sampler = Sampler(SamplingParams())
        with closing(self._decoder.tokens(logits, self.cache, sampler, [])) as tokens:
            next(tokens)
            started = time.perf_counter()
            for _ in range(count):
                next(tokens)
            return count / (time.perf_counter() - started)

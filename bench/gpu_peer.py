"""mlx-lm with V2-Lite's geometry and random weights of 4 bits: what we are measured beside."""

from __future__ import annotations

import argparse
import time
from typing import Any

import mlx.core as mx
import numpy as np
from gpu_report import Report
from gpu_runs import sizes

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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", type=int, default=64, help="values that share a scale")
    parser.add_argument("--chunk", type=int, default=2048, help="mlx-lm's own default")


def run(arguments: argparse.Namespace, report: Report) -> None:
    if arguments.cpu:
        mx.set_default_device(mx.cpu)
    size = sizes(arguments)
    config = V2_LITE | (SMALL if arguments.small else {})
    # MLX's CPU device takes a hundred times as long for float16.
    dtype = mx.float32 if arguments.cpu else mx.float16
    peer = Peer(config, dtype, arguments.group, arguments.chunk)
    report.figure("weights", mx.get_active_memory() / 1e9, "GB", f"groups of {arguments.group}")
    measure_decode(peer, report, 1, size.tokens, size.rounds)
    for count in (size.short, size.long):
        first, cache = peer.prefill(count)
        report.figure(f"prefill {count}, the first time", first, "tokens/s")
        speeds = [peer.prefill(count)[0] for _ in range(size.rounds)]
        report.figure(f"prefill {count}", speeds, "tokens/s")
    measure_decode(peer, report, size.long, size.tokens, size.rounds, cache)
    report.figure("memory at most", mx.get_peak_memory() / 1e9, "GB")


class Peer:
    def __init__(self, config: dict[str, Any], dtype: mx.Dtype, group: int, chunk: int) -> None:
        from mlx import nn
        from mlx.utils import tree_flatten
        from mlx_lm.models import deepseek_v2

        self.model = deepseek_v2.Model(deepseek_v2.ModelArgs.from_dict(config))
        self.model.set_dtype(dtype)
        nn.quantize(self.model, group_size=group, bits=4)
        for _, weight in tree_flatten(self.model.parameters()):
            mx.eval(weight)
        mx.clear_cache()
        self._vocabulary = config["vocab_size"]
        self._chunk = chunk

    def ids(self, count: int) -> mx.array:
        return mx.array((7919 * np.arange(count) + 11) % self._vocabulary)

    def prefill(self, count: int) -> tuple[float, Any]:
        """Tokens a second, and the cache."""
        from mlx_lm.models import cache

        rows = cache.make_prompt_cache(self.model)
        ids = self.ids(count)[None]
        started = time.perf_counter()
        for start in range(0, count, self._chunk):
            logits = self.model(ids[:, start : start + self._chunk], cache=rows)
            mx.eval(logits[:, -1], [row.state for row in rows])
        return count / (time.perf_counter() - started), rows

    def decode(self, count: int, rows: Any) -> float:
        """Tokens a second of mlx-lm's own loop, whose next step is begun before one is read."""
        from mlx_lm.generate import generate_step

        steps = generate_step(self.ids(1), self.model, max_tokens=count + 1, prompt_cache=rows)
        next(steps)
        started = time.perf_counter()
        done = sum(1 for _ in steps)
        return done / (time.perf_counter() - started)


def measure_decode(
    peer: Peer, report: Report, depth: int, count: int, rounds: int, rows: Any = None
) -> None:
    rows = peer.prefill(depth)[1] if rows is None else rows
    peer.decode(2, rows)
    speeds = [peer.decode(count, rows) for _ in range(rounds)]
    report.figure(f"decode {count} at {depth}", speeds, "tokens/s")

"""Models as a planner sees them that are too large to write: their bytes take no memory."""

from __future__ import annotations

from datetime import date
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from localds.gguf import GGMLType
from localds.gguf.tensor import Tensor
from localds.memory.gpu_plan import GpuPlacement, place_on_gpu
from localds.memory.plan import Plan, make_plan
from localds.memory.speeds import Speeds
from localds.models.geometry import Geometry
from localds.ops.mlx_device import Gpu

if TYPE_CHECKING:
    from collections.abc import Iterable

MIB, GIB = 1 << 20, 1 << 30
Q4_K, Q8_0, F32 = GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.F32

V2_LITE = Geometry(
    architecture="deepseek2",
    layers=27,
    dense_layers=1,
    hidden=2048,
    vocabulary=102400,
    context_length=163840,
    heads=16,
    experts=64,
    experts_used=6,
    experts_shared=2,
    cache_width=576,
    expanded_width=16 * (192 + 128),
)
V3 = Geometry(
    architecture="deepseek2",
    layers=61,
    dense_layers=3,
    hidden=7168,
    vocabulary=129280,
    context_length=163840,
    heads=128,
    experts=256,
    experts_used=8,
    experts_shared=1,
    cache_width=576,
    expanded_width=128 * (192 + 128),
)

SPEEDS = Speeds(
    memory_bytes_per_second=50e9,
    multiply_adds_per_second=1e12,
    disk_bytes_per_second=5e9,
    upload_bytes_per_second=25e9,
    device_bytes_per_second=1000e9,
    gpu="a card",
    measured=date(2026, 11, 26),
)
EXPERT = 2 * 2048 * 1408 * 144 // 256 + 1408 * 2048 * 34 // 32
"""Bytes of an expert of V2-Lite: Q4_K has 144 for 256 values, Q8_0 has 34 for 32."""


def card(total: int, free: int | None = None, *, unified: bool = False) -> Gpu:
    """A GPU with so many bytes."""
    kind = "metal" if unified else "cuda"
    return Gpu("a card", kind, total, total if free is None else free, unified)


def v2_lite() -> Any:
    """DeepSeek-V2-Lite: Q4_K, and Q8_0 for what comes down."""
    tensors = [("token_embd", Q4_K, (2048, 102400)), ("output", Q4_K, (2048, 102400))]
    for block in range(27):
        tensors += [
            (f"blk.{block}.{name}", kind, shape)
            for name, kind, shape in (
                ("attn_norm", F32, (2048,)),
                ("attn_q", Q4_K, (2048, 16 * 192)),
                ("attn_kv_a_mqa", Q8_0, (2048, 576)),
                ("attn_k_b", Q8_0, (128, 512, 16)),
                ("attn_v_b", Q8_0, (512, 128, 16)),
                ("attn_output", Q4_K, (2048, 2048)),
                *_feed_forward(block < 1, 2048, 10944, 1408, 64, 2, Q8_0),
            )
        ]
    return gguf_of(tensors)


def v3() -> Any:
    """DeepSeek-V3, 671 thousand million parameters, all in Q4_K."""
    tensors = [("token_embd", Q4_K, (7168, 129280)), ("output", Q4_K, (7168, 129280))]
    for block in range(61):
        tensors += [
            (f"blk.{block}.{name}", kind, shape)
            for name, kind, shape in (
                ("attn_norm", F32, (7168,)),
                ("attn_q_a", Q4_K, (7168, 1536)),
                ("attn_q_b", Q4_K, (1536, 128 * 192)),
                ("attn_kv_a_mqa", Q4_K, (7168, 576)),
                ("attn_k_b", Q8_0, (128, 512, 128)),
                ("attn_v_b", Q4_K, (512, 128, 128)),
                ("attn_output", Q4_K, (128 * 128, 7168)),
                *_feed_forward(block < 3, 7168, 18432, 2048, 256, 1, Q4_K),
            )
        ]
    return gguf_of(tensors)


def gguf_of(tensors: Iterable[tuple[str, GGMLType, tuple[int, ...]]]) -> Any:
    """What a planner reads of a GGUF file."""
    made = [_tensor(f"{name}.weight", kind, shape) for name, kind, shape in tensors]
    return SimpleNamespace(
        tensors={tensor.name: tensor for tensor in made}, paths=[Path("no.gguf")]
    )


def same(_kind: GGMLType, nbytes: int) -> int:
    """Bytes on a device that keeps the file's blocks."""
    return nbytes


def on_gpu(
    gguf: Any, geometry: Any, plan: Plan, gpu: Any, vram: int | None = None, **more: Any
) -> GpuPlacement:
    """`place_on_gpu` on a device that keeps the file's blocks, for chunks of 1024 tokens."""
    return place_on_gpu(
        gguf, geometry, plan, gpu, vram, **{"device_bytes": same, "chunk": 1024} | more
    )


def lite() -> tuple[Any, Plan]:
    """V2-Lite with a context of 8192 tokens."""
    gguf = v2_lite()
    return gguf, make_plan(gguf, V2_LITE, 8192)


def _feed_forward(
    dense: bool, hidden: int, width: int, narrow: int, experts: int, shared: int, down: GGMLType
) -> list[tuple[str, GGMLType, tuple[int, ...]]]:
    if dense:
        return [
            ("ffn_gate", Q4_K, (hidden, width)),
            ("ffn_up", Q4_K, (hidden, width)),
            ("ffn_down", down, (width, hidden)),
        ]
    wide = shared * narrow
    return [
        ("ffn_gate_inp", F32, (hidden, experts)),
        ("ffn_gate_exps", Q4_K, (hidden, narrow, experts)),
        ("ffn_up_exps", Q4_K, (hidden, narrow, experts)),
        ("ffn_down_exps", down, (narrow, hidden, experts)),
        ("ffn_gate_shexp", Q4_K, (hidden, wide)),
        ("ffn_up_shexp", Q4_K, (hidden, wide)),
        ("ffn_down_shexp", down, (wide, hidden)),
    ]


def _tensor(name: str, kind: GGMLType, shape: tuple[int, ...]) -> Tensor:
    nbytes = prod(shape) // kind.block_elements * kind.block_bytes
    data = np.broadcast_to(np.zeros(1, np.uint8), (nbytes,))
    return Tensor(name, kind, shape, data, 0, Path("no.gguf"))

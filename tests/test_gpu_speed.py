"""How fast a model with a GPU will be, against times computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gpu_cases import EXPERT, GIB, MIB, SPEEDS, V2_LITE, card, lite, on_gpu

from localds.memory.gpu_plan import GpuPlacement, describe_gpu
from localds.memory.gpu_speed import device_hits, expected_gpu_speed
from localds.memory.placement import place

if TYPE_CHECKING:
    from localds.memory.speeds import Speeds


def stream(speeds: Speeds | None, **more: Any) -> int | None:
    gguf, plan = lite()
    return on_gpu(
        gguf, V2_LITE, plan, card(24 * GIB), cpu_moe=True, speeds=speeds, **more
    ).stream_from


def test_prompts_are_streamed_from_where_that_is_faster() -> None:
    # 64 experts of 6.3 MB are there in 16.1 ms. Reading them takes half of that, so that it depends
    # on 6 * 8.65 million multiply-adds a token, 52 us: from 312 tokens on.
    seconds = 64 * EXPERT / 25e9
    least = seconds / (6 * 3 * 2048 * 1408 / 1e12)
    assert 310 < least < 312
    assert stream(SPEEDS) == 312
    # Where reading is slow, it depends on how much is read: 1 - (58 / 64)^n of the experts.
    slow = replace(SPEEDS, memory_bytes_per_second=20e9, multiply_adds_per_second=1e15)
    assert 1 - (58 / 64) ** 16 < 20 / 25 < 1 - (58 / 64) ** 17
    assert stream(slow) == 24
    assert stream(replace(slow, memory_bytes_per_second=26e9)) is None
    assert stream(SPEEDS, chunk=256) is None
    assert stream(SPEEDS, chunk=311) is None
    # At twice the speed half as many, 155.6.
    fast = replace(SPEEDS, upload_bytes_per_second=50e9)
    assert stream(fast) == 160
    assert stream(fast, chunk=157) == 157
    assert stream(None) is None
    assert stream(replace(SPEEDS, upload_bytes_per_second=None)) is None


def test_what_comes_from_disk_comes_as_slowly_to_the_gpu() -> None:
    slow = replace(SPEEDS, multiply_adds_per_second=1e11)
    assert stream(slow, ram=64 * GIB) == stream(slow) == 32
    # The disk gives 64 experts in 80 ms, and the CPU needs 0.52 ms a token.
    seconds = 64 * EXPERT / 5e9 / (6 * 3 * 2048 * 1408 / 1e11)
    assert 152 < seconds < 160
    assert stream(slow, ram=0) == 160


def placed(slots: tuple[int, ...], **more: Any) -> GpuPlacement:
    defaults: dict[str, Any] = {
        "gpu": "a card",
        "unified": False,
        "budget": 0,
        "weights": 120,
        "active_trunk": 100,
        "cache": 0,
        "scratch": 0,
        "slots": slots,
        "experts": 4,
        "expert_bytes": (10, 20),
        "staging": 0,
        "stream_from": None,
    }
    return GpuPlacement(**defaults | more)


def test_the_expected_speed() -> None:
    gguf, plan = lite()
    geometry = replace(V2_LITE, experts=4, experts_used=2)
    ram = place(gguf, V2_LITE, replace(plan, parts={}), None)
    speeds = replace(
        SPEEDS,
        device_bytes_per_second=100.0,
        memory_bytes_per_second=10.0,
        upload_bytes_per_second=5.0,
        disk_bytes_per_second=1.0,
    )
    # A token reads 100 bytes of the trunk and two experts of 10 and of 20 each.
    whole = placed((4, 4))
    assert expected_gpu_speed(whole, ram, geometry, speeds) == pytest.approx(1 / 1.6)
    half = placed((2, 2))
    assert device_hits(half) == 0.5
    assert expected_gpu_speed(half, ram, geometry, speeds) == pytest.approx(1 / (1 + 3))
    usage = np.array([[2, 1, 5, 4], [10, 0, 0, 0]], np.uint32)
    assert device_hits(half, usage) == pytest.approx(19 / 22)
    missed = 60 * 3 / 22
    told = expected_gpu_speed(half, ram, geometry, speeds, usage)
    assert told == pytest.approx(1 / (1 + missed / 10))
    unified = replace(half, unified=True)
    assert expected_gpu_speed(unified, ram, geometry, speeds) == pytest.approx(1 / (1.6 + 6))
    # Of the four experts that the GPU lacks, the pool has one.
    pool = replace(ram, resident=False, slot_bytes=1, slots=3, slots_total=8, window=1, ahead=1)
    disk = 30 * 0.75
    assert expected_gpu_speed(half, pool, geometry, speeds) == pytest.approx(1 / (1 + 3 + disk))
    # Of three uses that the GPU misses, that one has two.
    told = expected_gpu_speed(half, pool, geometry, speeds, usage)
    assert told == pytest.approx(1 / (1 + missed / 10 + missed / 3))
    unknown = replace(speeds, device_bytes_per_second=None)
    assert expected_gpu_speed(whole, ram, geometry, unknown) is None
    unknown = replace(speeds, disk_bytes_per_second=None)
    assert expected_gpu_speed(half, pool, geometry, unknown) is None
    assert expected_gpu_speed(half, ram, geometry, unknown) is not None


def test_what_lies_where_in_words() -> None:
    whole = placed((4, 4), weights=3 * GIB, cache=MIB)
    assert describe_gpu(whole) == "GPU a card: trunk 3 GiB, cache 1 MiB, all 8 experts (120 B)"
    part = placed((400, 240), experts=1024, stream_from=96)
    assert describe_gpu(part, 12.345) == (
        "GPU a card: trunk 120 B, cache 0 B, 640 of 2,048 experts (8.59 KiB); the others on the "
        "CPU; prompts of 96 tokens and more bring them to the GPU\n"
        "at most 12.3 tokens/s are expected"
    )
    assert describe_gpu(replace(part, stream_from=None)).endswith("; the others on the CPU")
    assert "come to it when" in describe_gpu(replace(part, unified=True, stream_from=1))
    dense = placed((), experts=0, expert_bytes=())
    assert describe_gpu(dense) == "GPU a card: trunk 120 B, cache 0 B"

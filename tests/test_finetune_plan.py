"""What training takes: figures of large models from their geometry, and measured with tiny ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import GIB, V2_LITE, V3, card, same, v2_lite, v3
from test_golden import convert_variant

from localds import models
from localds.finetune import sizes
from localds.finetune.config import ATTENTION, EXPERTS, FEED_FORWARD, TARGETS, AdapterConfig
from localds.finetune.groups import parse_targets
from localds.finetune.plan import TrainPlan, Wanted, describe_plan, plan_training
from localds.finetune.sizes import KEPT_BYTES, LOGIT_BYTES, SCORE_BYTES, SLICE_BYTES, SMALL
from localds.gguf import GGUFFile
from localds.memory.plan import BudgetError

RANK = 16


def wanted(length: int = 2048, batch: int = 8, **more: Any) -> Wanted:
    config = AdapterConfig(**{"rank": RANK, **more.pop("config", {})})
    return Wanted(config, length, batch, **more)


def lite(gib: float, run: Wanted | None = None) -> TrainPlan:
    budget = int(gib * GIB)
    gpu = card(max(budget, GIB))
    return plan_training(v2_lite(), V2_LITE, gpu, budget, run or wanted(), device_bytes=same)


def test_v2_lite_on_8_gib() -> None:
    plan = lite(8)
    assert plan.total <= 8 * GIB
    assert plan.rows * plan.accumulation == 8
    assert not plan.resident
    per_layer = (2048 + 3072) + (2048 + 576) + (2048 + 2048)  # q, kv_a, o
    assert plan.adapters == 4 * 27 * RANK * per_layer
    assert plan.moments == 2 * plan.adapters
    assert plan.gradients == 2 * plan.adapters  # a micro-batch's, and their sum
    # What is left is used for experts, but for less than one more.
    assert plan.total + max(plan.expert_bytes) > 8 * GIB


def test_v2_lite_as_a_whole_on_24_gib() -> None:
    plan = lite(24)
    assert plan.resident
    assert plan.pool == 26 * 64 * plan.expert_bytes[0]
    assert plan.staging == 0


def test_v3_on_24_gib_beside_512_gb() -> None:
    pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
    from localds.finetune.building import host_placement

    gguf, budget = v3(), 24 * GIB
    plan = plan_training(gguf, V3, card(budget), budget, wanted(), device_bytes=same)
    assert plan.total <= budget
    assert sum(plan.slots) < 58 * 256
    host = host_placement(gguf, V3, plan, 512_000_000_000)
    assert host.resident  # every expert in RAM
    assert host.total < 512_000_000_000
    assert not host_placement(gguf, V3, plan, 64 * GIB).resident  # with the others on disk


def test_larger_budgets_compute_more_at_once() -> None:
    plans = [lite(gib) for gib in (6, 8, 16, 24, 32, 40, 80, 141)]
    again = [plan.rows for plan in plans if plan.checkpointing]
    once = [plan.rows for plan in plans if not plan.checkpointing]
    # With as much as 40 GiB, layers need not be computed again, if fewer rows are computed at once.
    assert (len(again), len(once)) == (5, 3)
    for rows in (again[2:], once):
        assert rows == sorted(rows)
        assert rows[0] < rows[-1] == 8
    assert once[0] * 2048 >= 4096
    assert all(plan.rows * plan.accumulation == 8 for plan in plans)


def test_without_a_limit_all_is_computed_at_once() -> None:
    plan = plan_training(v3(), V3, card(GIB), None, wanted(), device_bytes=same)
    assert plan.resident
    assert (plan.rows, plan.checkpointing) == (8, False)


def test_what_was_chosen_is_kept() -> None:
    plan = lite(141, wanted(rows=2, checkpointing=True))
    assert (plan.rows, plan.accumulation, plan.checkpointing) == (2, 4, True)


def test_adam_in_8_bits() -> None:
    full, small = lite(24), lite(24, wanted(optimizer="adamw8bit"))
    assert 0.25 < small.moments / full.moments < 0.26


@pytest.mark.parametrize(
    ("gib", "run", "remedies"),
    [
        (4, wanted(8192), ["--length 1024 would fit"]),
        (
            8,
            wanted(512, config={"rank": 128, "targets": (*ATTENTION, EXPERTS)}),
            ["--rank 8, or --targets attention would fit"],
        ),
        (5, wanted(256, config={"rank": 1024}), ["--rank 256 would fit"]),
        (0.5, wanted(), ["even with --length 128 and rank 4", "give more memory"]),
    ],
)
def test_what_would_fit(gib: float, run: Wanted, remedies: list[str]) -> None:
    with pytest.raises(BudgetError) as caught:
        lite(gib, run)
    for remedy in remedies:
        assert remedy in str(caught.value)


def test_a_remedy_fits() -> None:
    assert lite(4, wanted(1024)).total <= 4 * GIB
    assert lite(5, wanted(256, config={"rank": 256})).total <= 5 * GIB
    with pytest.raises(BudgetError):
        lite(4, wanted(2048, config={"rank": 64}))


def test_an_absent_target() -> None:
    with pytest.raises(ValueError, match="has none of q_a_proj"):
        lite(24, wanted(config={"targets": ("q_a_proj",)}))


def test_the_table() -> None:
    plan = lite(8)
    text = describe_plan(plan)
    assert sum(plan.parts.values()) == plan.total
    assert "of 8 GiB" in text
    assert "of 1,664 experts on the device" in text


def test_groups() -> None:
    assert parse_targets("attention") == ATTENTION
    assert parse_targets("all, router") == (*ATTENTION, *FEED_FORWARD, "router")
    assert parse_targets("o_proj,q_proj") == ("q_proj", "o_proj")
    with pytest.raises(ValueError, match="'qkv' is unknown; choose from attention, ffn, all"):
        parse_targets("qkv")


# ---- measured ----


@pytest.mark.parametrize(
    ("name", "rows", "length", "checkpointing", "method", "kept"),
    [
        ("v2-lite", 4, 192, True, "lora", KEPT_BYTES),
        ("v2-lite", 16, 128, True, "lora", 1 << 20),
        ("v2-lite", 16, 128, False, "lora", 1 << 20),
        ("v3", 16, 32, True, "lora", KEPT_BYTES),
        ("v3", 4, 128, False, "dora", KEPT_BYTES),
        ("v3", 16, 128, True, "dora", 1 << 20),
        ("mixtral", 2, 256, False, "lora", KEPT_BYTES),
        ("mixtral", 8, 256, True, "lora", 1 << 20),
    ],
)
def test_the_plan_holds(
    name: str,
    rows: int,
    length: int,
    checkpointing: bool,
    method: Any,
    kept: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never more than planned, and no less than half."""
    mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
    from test_finetune_model import one_batch

    from localds.finetune.loop import TrainSettings
    from localds.finetune.loop.optimizer import AdamW
    from localds.finetune.model import TrainModel, slices
    from localds.finetune.model.attend import SCORE_BYTES as SCORES
    from localds.finetune.model.head import LOGIT_BYTES as LOGITS
    from localds.finetune.model.matrices import SLICE_BYTES as SLICES
    from localds.ops.mlx.backend import PORTABLE

    assert (SCORE_BYTES, LOGIT_BYTES, SLICE_BYTES) == (SCORES, LOGITS, SLICES)
    assert slices.KEPT_BYTES == KEPT_BYTES
    for module in (sizes, slices):
        monkeypatch.setattr(module, "KEPT_BYTES", kept)
    config = AdapterConfig(rank=8, method=method, targets=TARGETS)
    with GGUFFile.open(convert_variant(name, tmp_path)) as gguf:
        geometry = models.read_geometry(gguf)
        run = Wanted(config, length, rows, "adamw", checkpointing, rows)
        gpu = replace(card(GIB), kind="cpu")
        plan = plan_training(gguf, geometry, gpu, None, run, device_bytes=PORTABLE.device_bytes)
        mx.clear_cache()
        before = mx.get_active_memory()
        stream = mx.new_thread_unsafe_stream(mx.cpu)
        model = TrainModel(gguf, config, PORTABLE, stream, checkpointing=checkpointing)
    params, optimizer = model.init(0), AdamW(TrainSettings())
    batch = one_batch(length, rows)
    mx.reset_peak_memory()
    with mx.stream(stream):
        for _ in range(2):
            loss, gradients = model.value_and_grad(params, batch)
            mx.eval(loss, gradients)
            optimizer.update(params, gradients, 1.0, 1e-4)
    peak = mx.get_peak_memory() - before
    planned = plan.total - plan.runtime
    assert planned / 2 <= peak <= planned


def test_small_tensors_are_those_of_the_optimizer() -> None:
    pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
    from localds.finetune.loop import optimizer

    assert SMALL == optimizer.SMALL

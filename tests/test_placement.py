"""What fits where, against sizes computed by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from offloading import budget_for

from localds import models
from localds.gguf import GGUFFile
from localds.memory.placement import (
    Placement,
    active_bytes,
    hit_rate,
    missed_bytes,
    place,
    slot_bytes,
)
from localds.memory.plan import BudgetError, Plan, make_plan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localds.models.geometry import Geometry

PAGE = 4096
PARTS = ("gate", "up", "down")


@pytest.fixture
def guide(guide_path: Path) -> Iterator[tuple[GGUFFile, Geometry, Plan]]:
    with GGUFFile.open(guide_path) as gguf:
        geometry = models.read_geometry(gguf)
        yield gguf, geometry, make_plan(gguf, geometry, 2048)


def expert_parts(gguf: GGUFFile) -> list[list[int]]:
    """Bytes of gate, up and down of one expert, by layer."""
    return [
        [gguf.tensors[f"blk.{i}.ffn_{part}_exps.weight"].nbytes // 16 for part in PARTS]
        for i in range(1, 6)
    ]


def test_slots_hold_each_part_wherever_its_pages_begin(guide: tuple) -> None:
    gguf, geometry, _ = guide
    largest = max(
        sum((part + PAGE - 1) // PAGE * PAGE + PAGE for part in parts)
        for parts in expert_parts(gguf)
    )
    assert slot_bytes(gguf, geometry) == largest


def test_all_of_it_fits_in_exactly_its_total(guide: tuple) -> None:
    gguf, geometry, plan = guide
    assert place(gguf, geometry, plan, plan.total).resident
    assert place(gguf, geometry, plan, None).resident
    assert not place(gguf, geometry, plan, plan.total - 1).resident


@pytest.mark.parametrize("slots", [12, 13, 50, 60])
def test_the_total_is_within_the_budget(guide_path: Path, guide: tuple, slots: int) -> None:
    gguf, geometry, plan = guide
    budget = budget_for(guide_path, slots, 2048)
    placement = place(gguf, geometry, plan, budget)
    assert placement.slots == slots
    assert placement.total == budget
    assert place(gguf, geometry, plan, budget - 1).slots == slots - 1 if slots > 12 else True
    assert placement.main + placement.window + placement.ahead == slots
    assert min(placement.window, placement.ahead) >= geometry.experts_used


def test_below_the_floor_it_says_what_would_fit(guide_path: Path, guide: tuple) -> None:
    gguf, geometry, plan = guide
    floor = budget_for(guide_path, 3 * geometry.experts_used, 2048)
    with pytest.raises(BudgetError, match=r"a context of 2047 tokens would fit"):
        place(gguf, geometry, plan, floor - 1)
    place(gguf, geometry, make_plan(gguf, geometry, 2047), floor - 1)
    with pytest.raises(BudgetError, match=r"at least .* are needed; use a smaller quantization"):
        place(gguf, geometry, plan, floor - plan.cache)


def test_expected_figures(guide: tuple) -> None:
    gguf, geometry, plan = guide
    placement = Placement(plan, 1, False, 1, slots=50, slots_total=80, window=6, ahead=4)
    assert hit_rate(placement) == 0.5
    usage = np.zeros((5, 16), np.uint32)
    usage[0, :3] = 1, 2, 5
    assert hit_rate(placement, usage) == 1
    assert hit_rate(Placement(plan, 1, False, 1, 12, 80, 6, 4), usage) == pytest.approx(7 / 8)
    token = 4 * sum(map(sum, expert_parts(gguf)))
    assert missed_bytes(gguf, geometry, 0.75) == pytest.approx(token / 4)
    embedding = gguf.tensors["token_embd.weight"].nbytes
    all_experts = 16 * sum(map(sum, expert_parts(gguf)))
    trunk = sum(t.nbytes for t in gguf.tensors.values()) - all_experts
    assert active_bytes(gguf, geometry, placement) == pytest.approx(trunk - embedding + token)


def test_a_dense_model_has_nothing_to_leave_on_disk(guide: tuple) -> None:
    gguf, geometry, _ = guide
    plan = Plan({"embedding": 1000}, context=100, cache_per_token=10, runtime=0)
    from dataclasses import replace

    dense = replace(geometry, experts=0, experts_used=0)
    with pytest.raises(BudgetError, match="a context of 50 tokens would fit"):
        place(gguf, dense, plan, 1500)
    with pytest.raises(BudgetError, match="smaller quantization"):
        place(gguf, dense, plan, 1000)

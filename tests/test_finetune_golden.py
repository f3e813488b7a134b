"""Losses of 30 steps, and the adapters after them, against those of PEFT in tests/golden/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from finetune_curves import (
    CASES,
    ggufs,
    largest_difference,
    largest_drift,
    stored_case,
    stored_curves,
    train,
)

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOLERANCE = 1e-3
DRIFT = 5e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF files by the names of bases, each made once."""
    return ggufs(tmp_path_factory.mktemp("curves"))


def parameters() -> Iterator[Any]:
    """All cases; of those with a single target, the usual run tries them on one model only."""
    for name, case in CASES.items():
        usual = len(case.targets) > 1 or (case.base == "v2" and case.method == "lora")
        yield pytest.param(name, marks=() if usual else pytest.mark.thorough)


@pytest.mark.parametrize("name", parameters())
def test_curve_is_that_of_peft(files: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    case, expected = stored_case(name)
    ours = train(case, files(case.base), tmp_path)
    assert largest_difference(ours.losses, expected["losses"]) < TOLERANCE
    assert largest_drift(ours.moved(), expected["moved"]) < DRIFT


def test_every_curve_is_used() -> None:
    assert stored_curves().keys() == CASES.keys(), "run tests/make_finetune_golden.py"
    assert all(curve["losses"][-1] < curve["losses"][0] for curve in stored_curves().values())

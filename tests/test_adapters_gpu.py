"""Adapters on a GPU, in whose place MLX's CPU device stands, see tests/test_on_gpu.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from adapter_cases import Case
from checkpoints import token_ids
from test_on_gpu import SPEEDS

import localds

pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

if TYPE_CHECKING:
    from pathlib import Path

IDS = token_ids(5, 16)


@pytest.mark.parametrize("variant", ["v3", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"cpu_moe": True}, {"n_cpu_moe": 2}], ids=str)
def test_adapters_count_wherever_weights_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("LOCALDS_GPU", "cpu")
    monkeypatch.setattr("localds.on_gpu.speeds_for", lambda *_: SPEEDS)
    case = Case(variant)
    plain = case.gguf(tmp_path / "plain.gguf")
    folder = case.folder(tmp_path / "adapter")
    found = []
    for device, more in (("cpu", {}), ("gpu", options)):
        with localds.load(plain, device, adapters=[(folder, 1.0)], **more) as model:
            found.append(model.logits(IDS))
    assert np.abs(found[1] - found[0]).max() < 1e-3 * np.abs(found[0]).max()
    with localds.load(plain, "cpu") as model:
        assert np.abs(model.logits(IDS) - found[0]).max() > 0.1 * np.abs(found[0]).max()

"""Logits against live transformers: other seeds and longer texts than the golden files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    GOLDEN,
    VARIANTS,
    Variant,
    make_weights,
    token_ids,
    write_checkpoint,
)

import localds
from convert import convert_checkpoint

pytestmark = pytest.mark.oracle

TOKENS = 600
TOLERANCE = 1e-4


def parameters() -> list[tuple[str, int]]:
    return [(name, seed) for name in VARIANTS for seed in (2, 3)]


@pytest.mark.parametrize(("name", "seed"), parameters())
def test_against_transformers(tmp_path: Path, name: str, seed: int) -> None:
    pytest.importorskip("torch")
    from make_golden import describe, reference_logits

    variant: Variant = VARIANTS[name]
    config, shapes = describe(variant)
    folder = tmp_path / name
    write_checkpoint(folder, config, make_weights(shapes, seed), variant.shards, variant.dtype)
    convert_checkpoint(folder, tmp_path / "model.gguf", pre=variant.pre)
    ids = token_ids(seed, TOKENS)
    expected = reference_logits(folder, variant.model_class, ids)

    with localds.load(tmp_path / "model.gguf") as model:
        whole = model.logits(ids)
        session = model.session(context=TOKENS, chunk=37, cache_type="f32")
        prefill = session.evaluate(ids[:-40], all_logits=True)
        decode = [session.evaluate([token])[0] for token in ids[-40:]]
    for logits in (whole, np.concatenate([prefill, decode])):
        difference = np.abs(logits - expected)
        assert difference.max() < TOLERANCE * np.abs(expected).max()
        assert difference.mean() < TOLERANCE * np.abs(expected).mean()


@pytest.mark.parametrize("name", VARIANTS)
def test_golden_files_are_current(tmp_path: Path, name: str) -> None:
    """The committed files are what tests/make_golden.py writes."""
    pytest.importorskip("torch")
    from make_golden import write_golden

    write_golden(name, tmp_path)
    made, kept = tmp_path / name / "tensors.json", GOLDEN / name / "tensors.json"
    assert made.read_text() == kept.read_text(), "run tests/make_golden.py"
    with (
        np.load(tmp_path / name / "logits.npz") as made,
        np.load(GOLDEN / name / "logits.npz") as kept,
    ):
        np.testing.assert_array_equal(made["ids"], kept["ids"])
        np.testing.assert_allclose(made["logits"], kept["logits"], atol=1e-4)

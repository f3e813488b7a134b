"""Logits of every architecture variant against those of transformers, kept in tests/golden/."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from checkpoints import (
    GOLDEN,
    VARIANTS,
    golden_config,
    golden_shapes,
    make_weights,
    write_variant,
)
from derive_gguf import extra_layer, fused_gate_up, legacy_kv_b

import localds
from convert import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

TOLERANCE = 1e-4

# Other forms of the same model, which must give the same logits.
DERIVED = {
    f"{variant}, {form}": (variant, form)
    for variant, form in [
        ("v2-lite", "legacy kv_b"),
        ("v3", "legacy kv_b"),
        ("v2-lite", "fused gate_up"),
        ("v3", "fused gate_up"),
        ("v3", "extra layer"),
        ("glm-4.7-flash", "extra layer"),
    ]
}


@cache
def golden(name: str) -> tuple[list[int], Logits]:
    with np.load(GOLDEN / name / "logits.npz") as stored:
        return stored["ids"].tolist(), stored["logits"]


def convert_variant(name: str, folder: Path) -> Path:
    """Write the variant's checkpoint and convert it."""
    path = folder / f"{name}.gguf"
    convert_checkpoint(write_variant(name, folder / name), path, pre=VARIANTS[name].pre)
    return path


def derive(name: str, form: str, source: Path, target: Path) -> Path:
    """Rewrite a variant's file into another form."""
    config = golden_config(name)
    if form == "legacy kv_b":
        weights = make_weights(golden_shapes(name), VARIANTS[name].seed)
        return legacy_kv_b(source, target, config, weights)
    if form == "fused gate_up":
        return fused_gate_up(source, target)
    return extra_layer(source, target, config["num_hidden_layers"])


def ggufs(folder: Path) -> Callable[[str], Path]:
    """GGUF files by name, variants and derived ones, each made once in `folder`."""

    @cache
    def make(name: str) -> Path:
        if name in VARIANTS:
            return convert_variant(name, folder)
        variant, form = DERIVED[name]
        return derive(variant, form, make(variant), folder / f"{name}.gguf")

    return make


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF files by name, each made once."""
    return ggufs(tmp_path_factory.mktemp("golden"))


def assert_close(logits: Logits, expected: Logits) -> None:
    assert logits.shape == expected.shape
    assert logits.dtype == np.float32
    difference = np.abs(logits - expected)
    assert difference.max() < TOLERANCE * np.abs(expected).max()
    assert difference.mean() < TOLERANCE * np.abs(expected).mean()


@pytest.mark.parametrize("name", [*VARIANTS, *DERIVED])
def test_one_piece(files: Callable[[str], Path], name: str) -> None:
    ids, expected = golden(DERIVED[name][0] if name in DERIVED else name)
    with localds.load(files(name)) as model:
        assert_close(model.logits(ids), expected)


@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize("name", [*VARIANTS, *DERIVED])
def test_in_chunks(files: Callable[[str], Path], name: str, chunk: int) -> None:
    """Prefill in chunks (of one token: as in decoding) from an exact cache."""
    ids, expected = golden(DERIVED[name][0] if name in DERIVED else name)
    with localds.load(files(name)) as model:
        session = model.session(context=96, chunk=chunk, cache_type="f32")
        assert_close(session.evaluate(ids, all_logits=True), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_truncated_session_continues(files: Callable[[str], Path], name: str) -> None:
    """Going back to a prefix and decoding on gives the same logits as without the detour."""
    ids, expected = golden(name)
    with localds.load(files(name)) as model:
        session = model.session(context=96, cache_type="f32")
        session.evaluate(ids[:40])
        session.evaluate(ids[60:70])
        session.truncate(33)
        rest = [session.evaluate([token])[0] for token in ids[33:]]
    assert_close(np.stack(rest), expected[33:])


@pytest.mark.parametrize(
    ("name", "cache_type", "tolerance"),
    [
        ("v2-lite", "f16", 0.005),
        ("v2-lite", "q8_0", 0.1),
        ("v3", "f16", 0.005),
        ("v3", "q8_0", 0.1),
        ("mixtral", "f16", 0.005),
    ],
)
def test_smaller_caches(
    files: Callable[[str], Path], name: str, cache_type: str, tolerance: float
) -> None:
    """Rounded rows (by about 2^-12 or 2^-8 of their values) move the logits some ten times that.

    The typical token counts: for a few, rounding turns the choice of an expert.
    """
    ids, expected = golden(name)
    with localds.load(files(name)) as model:
        session = model.session(context=96, cache_type=cache_type)
        logits = session.evaluate(ids, all_logits=True)
    error = np.sqrt(np.mean((logits - expected) ** 2, axis=1))
    assert 0 < np.median(error) < tolerance * expected.std()

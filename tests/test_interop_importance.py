"""Importance matrices, perplexity and divergence beside llama.cpp's own programs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf import GGUFReader
from llama_cpp import LlamaCpp, find_llama_cpp
from test_interop import DERIVED, MODELS, derive, shapes, weight

import localds
from convert import convert_checkpoint
from localds import importance, windows
from localds.evaluate import evaluate
from localds.importance import Collector
from localds.scores import compare, perplexity

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.interop

TEXT = Path(__file__).parent.parent / "LICENSE"
WINDOW = 128
NAMES = [*MODELS, *DERIVED]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return find_llama_cpp(tmp_path_factory.mktemp("llama_cpp"))


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The models as F32 files, each made once."""
    folder = tmp_path_factory.mktemp("importance")

    @cache
    def make(name: str) -> Path:
        if name in DERIVED:
            return derive(name, make(DERIVED[name]), folder / f"{name}.gguf")
        architecture, values = MODELS[name]
        config = {**values, "architectures": [architecture]}
        weights = {tensor: weight(tensor, shape) for tensor, shape in shapes(config).items()}
        write_checkpoint(folder / name, config, weights)
        convert_checkpoint(folder / name, folder / f"{name}.gguf", pre="deepseek-llm")
        (folder / name / "model.safetensors").unlink()
        return folder / f"{name}.gguf"

    return make


def collect(path: Path, target: Path) -> Path:
    with localds.load(path) as model:
        cut = windows.cut(model, windows.read_text(TEXT), WINDOW)
        collector = Collector(model, output_weight=True)
        chunks = list(collector.run(cut))[-1]
        importance.save(target, collector.sums(), dataset=str(TEXT), chunks=chunks, size=WINDOW)
    return target


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = GGUFReader(path)
    keys = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(("general.", "imatrix."))
    }
    return keys, {tensor.name: tensor.data for tensor in reader.tensors}


@pytest.mark.parametrize("name", NAMES)
def test_importance(
    name: str, llama_cpp: LlamaCpp, full_precision: Callable[[str], Path], tmp_path: Path
) -> None:
    model = full_precision(name)
    theirs = tmp_path / "theirs.gguf"
    llama_cpp.read_text(
        "imatrix", "-m", model, "-f", TEXT, "-o", theirs, "--process-output", window=WINDOW
    )
    keys, sums = read(theirs)
    our_keys, our_sums = read(collect(model, tmp_path / "ours.gguf"))
    assert our_keys == keys
    assert our_sums.keys() == sums.keys()
    for tensor, expected in sums.items():
        actual = our_sums[tensor].reshape(expected.shape)
        if tensor.endswith(".counts"):
            # A tie of two experts may fall either way.
            assert np.abs(actual - expected).sum() <= 0.002 * expected.sum(), tensor
        else:
            assert np.abs(actual - expected).sum() <= 0.01 * expected.sum(), tensor


@pytest.mark.parametrize("preset", ["Q4_K_M", "IQ4_XS"])
def test_quantizer_uses_it(
    preset: str, llama_cpp: LlamaCpp, full_precision: Callable[[str], Path], tmp_path: Path
) -> None:
    """It quantizes as with its own program's file, and otherwise than without one."""
    model = full_precision("v3")
    ours = collect(model, tmp_path / "ours.gguf")
    theirs = tmp_path / "theirs.gguf"
    llama_cpp.read_text("imatrix", "-m", model, "-f", TEXT, "-o", theirs, window=WINDOW)

    files = {
        name: llama_cpp.quantize(model, tmp_path / f"{name}-{preset}.gguf", preset, imatrix)
        for name, imatrix in {"ours": ours, "theirs": theirs, "none": None}.items()
    }
    with_ours, with_theirs, without = (
        {t.name: t.data for t in GGUFReader(file).tensors} for file in files.values()
    )
    assert read(files["ours"])[0]["general.architecture"] == "deepseek2"
    for name in ("attn_output", "ffn_down_exps", "ffn_gate_exps", "attn_k_b", "attn_v_b"):
        tensor = f"blk.2.{name}.weight"
        data = with_ours[tensor]
        assert (data != with_theirs[tensor]).mean() < 0.01, tensor
        assert (data != without[tensor]).mean() > 0.05, tensor


def figures(printed: str, name: str) -> tuple[float, float]:
    found = re.search(rf"{re.escape(name)}\s*[:=]\s*([-\d.]+)\s*(?:\+/-|±)?\s*([\d.]+)?", printed)
    assert found, printed[-2000:]
    return float(found[1]), float(found[2] or 0)


@pytest.mark.parametrize("name", ["v3", "mixtral"])
def test_perplexity_and_divergence(
    name: str, llama_cpp: LlamaCpp, full_precision: Callable[[str], Path], tmp_path: Path
) -> None:
    path = full_precision(name)
    small = llama_cpp.quantize(path, tmp_path / "small.gguf", "Q4_0")
    base = tmp_path / "base"
    options = ("--kl-divergence-base", base)
    alone = llama_cpp.read_text(
        "perplexity", "-m", path, "-f", TEXT, *options, window=WINDOW, last="Final"
    )
    beside = llama_cpp.read_text(
        "perplexity", "-m", small, *options, "--kl-divergence", window=WINDOW, last="Same top p"
    )
    with localds.load(path) as reference, localds.load(small) as model:
        cut = windows.cut(model, windows.read_text(TEXT), WINDOW)
        exact = perplexity(evaluate(reference, cut).nll)
        scores = evaluate(model, cut, reference)
    found = compare(scores)

    # In float32 only rounding differs, ...
    assert exact == pytest.approx(figures(alone, "PPL"), rel=5e-3)
    assert found.reference_perplexity == exact
    # ... in four bits the two programs also round activations differently.
    assert perplexity(scores.nll) == pytest.approx(figures(beside, "Mean PPL(Q)"), rel=0.02)
    kl, error = figures(beside, "Mean    KLD")
    assert found.mean_kl.value == pytest.approx(kl, rel=0.05)
    assert found.mean_kl.error == pytest.approx(error, rel=0.2)
    assert found.kl_99 == pytest.approx(figures(beside, "99.0%   KLD")[0], rel=0.2)
    top, error = figures(beside, "Same top p")
    assert 100 * found.same_top.value == pytest.approx(top, abs=1)

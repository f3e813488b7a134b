"""Biases of routers that training moved: read beside adapters, applied, merged, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from adapter_cases import ROUTER, Case
from checkpoints import token_ids
from offloading import budget_for
from safetensors.numpy import load_file, save_file

import localds
from convert import convert, merge_adapters, open_source
from convert.recipes import AS_STORED
from localds.adapters import AdapterError, Base, apply, read_adapter, write_peft
from localds.gguf import GGUFFile
from localds.memory.latents import LatentCache
from localds.routing_trace import Tracer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

CASE = Case("kimi-k2", modules=ROUTER)  # of 12 experts 4 are chosen, without groups
NAMES = tuple(f"blk.{layer}.exp_probs_b.bias" for layer in (1, 2))
IDS = token_ids(11, 48)
FILE = "router_biases.safetensors"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return CASE.gguf(tmp_path / "plain.gguf")


def adapter(folder: Path, biases: dict[str, Any]) -> Path:
    """An adapter whose pairs change nothing, so that the biases alone do."""
    pairs = {n: t * np.float32("lora_A" in n) for n, t in CASE.tensors().items()}
    CASE.folder(folder, pairs)
    save_file(biases, folder / FILE)
    return folder


def trained(seed: int) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(-0.5, 0.5, 12).astype(np.float32) for name in NAMES}


def stored(path: Path, name: str) -> Floats:
    with GGUFFile.open(path) as gguf:
        return gguf.tensors[name].data.view(np.float32).copy()


def choices(path: Path, *adapters: tuple[Path, float], **options: Any) -> NDArray[np.int64]:
    """The experts of the first layer that has some, sorted, [tokens, 4]."""
    with localds.load(path, "cpu", adapters=adapters, **options) as model:
        tracer = Tracer(model.decoder)
        geometry = model.geometry
        ids = np.array(IDS, np.int32)
        tracer.decoder.states(ids, LatentCache(geometry.layers, geometry.cache_width, len(IDS)))
        return np.sort(tracer.trace().ids[: len(IDS)], axis=1)


def by_hand(path: Path, bias: NDArray[Any]) -> NDArray[np.int64]:
    """The four experts whose sigmoid with this bias is largest, from the layer's hidden states."""
    with localds.load(path, "cpu") as model:
        dense, moe = model.decoder.layers[:2]
        rows = LatentCache(2, model.geometry.cache_width, len(IDS))
        rows.reserve(len(IDS))
        x = model.decoder.embedding(np.array(IDS, np.int32))
        x = dense.feed_forward(dense.attention(x, rows.layers[0], 0))
        x = moe.attention(x, rows.layers[1], 0).astype(np.float64)
    norm, router = (stored(path, f"blk.1.{n}.weight") for n in ("ffn_norm", "ffn_gate_inp"))
    normalized = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6) * norm
    scores = 1 / (1 + np.exp(-normalized @ router.reshape(12, -1).T)) + bias
    return np.sort(np.argsort(-scores)[:, :4], axis=1)


def test_trained_biases_choose_the_experts(plain: Path, tmp_path: Path) -> None:
    """Whole, in part, added up, and with experts on disk."""
    first, second = trained(1), trained(2)
    one, two = adapter(tmp_path / "one", first), adapter(tmp_path / "two", second)
    biases = (stored(plain, NAMES[0]), first[NAMES[0]], second[NAMES[0]])
    base, a, b = (bias.astype(np.float64) for bias in biases)
    cases: list[tuple[list[tuple[Path, float]], NDArray[Any]]] = [
        ([], base),
        ([(one, 1.0)], a),
        ([(one, 0.5)], (base + a) / 2),
        ([(one, 1.0), (two, 0.5)], a + (b - base) / 2),
        ([(one, 0.0)], base),
    ]
    found = [choices(plain, *adapters) for adapters, _ in cases]
    for ours, (_, bias) in zip(found, cases, strict=True):
        np.testing.assert_array_equal(ours, by_hand(plain, bias))
    assert all((found[i] != found[j]).any() for i in range(4) for j in range(i))
    on_disk = choices(plain, *cases[2][0], ram=budget_for(plain, 13))
    np.testing.assert_array_equal(on_disk, found[2])


def test_the_whole_change_is_the_trained_bias(plain: Path, tmp_path: Path) -> None:
    """To the bit; a layer that the file leaves out keeps its own."""
    moved = {NAMES[0]: trained(3)[NAMES[0]] * np.float32(1e-3)}
    folder = adapter(tmp_path / "one", moved)
    with GGUFFile.open(plain) as gguf:
        apply(gguf, [(read_adapter(folder, Base.of(gguf)), 1.0)]).fill()
        ours = [gguf.tensors[name].data.view(np.float32).copy() for name in NAMES]
    np.testing.assert_array_equal(ours[0], moved[NAMES[0]])
    np.testing.assert_array_equal(ours[1], stored(plain, NAMES[1]))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_merged_is_applied(plain: Path, tmp_path: Path, strength: float) -> None:
    folders = [adapter(tmp_path / str(seed), trained(seed)) for seed in (1, 2)]
    named = [(folder, strength) for folder in folders]
    source = merge_adapters(open_source(str(plain), keep_types=True), named)
    convert(source, tmp_path / "merged.gguf", recipe=AS_STORED)
    with localds.load(plain, "cpu", adapters=named) as model:
        applied = model.logits(IDS)
        for name in NAMES:
            both = model.gguf.tensors[name].data.view(np.float32)
            np.testing.assert_array_equal(stored(tmp_path / "merged.gguf", name), both)
    with localds.load(tmp_path / "merged.gguf", "cpu") as model:
        np.testing.assert_array_equal(model.logits(IDS), applied)


def test_a_checkpoint_is_merged_with_them(plain: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "one", trained(1))
    merged = merge_adapters(open_source(str(plain.with_suffix(".checkpoint"))), [(folder, 1.0)])
    convert(merged, tmp_path / "merged.gguf", recipe="Q8_0")
    for name, bias in trained(1).items():
        np.testing.assert_array_equal(stored(tmp_path / "merged.gguf", name), bias)


def test_contexts_belong_to_the_biases(plain: Path, tmp_path: Path) -> None:
    marks = set()
    for seed in (1, 2):
        folder = adapter(tmp_path / str(seed) / "same", trained(seed))
        with localds.load(plain, "cpu", adapters=[(folder, 1.0)]) as model:
            marks.add(model.fingerprint)
    (folder / FILE).unlink()
    with localds.load(plain, "cpu", adapters=[(folder, 1.0)]) as model:
        marks.add(model.fingerprint)
    assert len(marks) == 3


def test_folders_are_written_with_their_biases(plain: Path, tmp_path: Path) -> None:
    """And lose those of an earlier adapter."""
    folder = adapter(tmp_path / "one", trained(1))
    with GGUFFile.open(plain) as gguf:
        base = Base.of(gguf)
        read = read_adapter(folder / "adapter_model.safetensors", base)
        write_peft(tmp_path / "copy", read, base)
        kept = load_file(tmp_path / "copy" / FILE)
        assert kept.keys() == set(NAMES)
        for name, bias in trained(1).items():
            np.testing.assert_array_equal(kept[name], bias)
        assert read_adapter(tmp_path / "copy", base).digest() == read.digest()
        write_peft(tmp_path / "copy", replace(read, biases={}), base)
        assert not read_adapter(tmp_path / "copy", base).biases


BAD: dict[str, tuple[Callable[[Floats], dict[str, Any]], str]] = {
    "too few experts": (lambda b: {NAMES[0]: b[:-1]}, r"has shape \(11,\).*needs \(12,\)"),
    "two dimensions": (lambda b: {NAMES[0]: b[None]}, r"has shape \(1, 12\)"),
    "no number": (lambda b: {NAMES[1]: b * np.float32(np.nan)}, "no numbers"),
    "beyond float32": (lambda b: {NAMES[1]: b + np.float64(1e300)}, "no numbers"),
    "integers": (lambda b: {NAMES[0]: b.astype(np.int32)}, "is I32"),
    "a dense layer": (lambda b: {"blk.0.exp_probs_b.bias": b}, "no bias of the router"),
    "a layer too many": (lambda b: {"blk.3.exp_probs_b.bias": b}, "no bias of the router"),
    "another tensor": (lambda b: {"blk.1.ffn_norm.weight": b}, "no bias of the router"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_models_and_damage_are_refused(plain: Path, tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    folder = adapter(tmp_path / "bad", change(trained(1)[NAMES[0]]))
    with pytest.raises(AdapterError, match=message) as told:
        localds.load(plain, "cpu", adapters=[(folder, 1.0)])
    assert FILE in str(told.value)


def test_a_file_that_was_cut_short_is_refused(plain: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "bad", trained(1)) / FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="cut short or damaged"):
        localds.load(plain, "cpu", adapters=[(path.parent, 1.0)])


def test_a_scale_that_no_bias_holds(plain: Path, tmp_path: Path) -> None:
    biases = {name: bias * np.float32(1e20) for name, bias in trained(1).items()}
    folder = adapter(tmp_path / "one", biases)
    with pytest.raises(AdapterError, match=r"exp_probs_b.*the scale is too large"):
        localds.load(plain, "cpu", adapters=[(folder, 1e30)])
    source = merge_adapters(open_source(str(plain), keep_types=True), [(folder, 1e30)])
    with pytest.raises(ValueError, match=r"exp_probs_b"):
        convert(source, tmp_path / "merged.gguf", recipe=AS_STORED)

"""Adapters in a model: every kind of tensor against plain numpy on the checkpoint's matrices."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from adapter_cases import ATTENTION, DENSE, EVERYTHING, EXPERTS, ROUTER, Case
from checkpoints import token_ids
from derive_gguf import fused_gate_up, legacy_kv_b
from offloading import budget_for

import localds
from convert import convert, open_source
from localds import _native
from localds.adapters import AdapterError, Base, apply, merged, read_adapter
from localds.gguf import GGMLType, GGUFFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

IDS = token_ids(5, 24)
CASES = {
    "v3": Case("v3"),
    "v3, rslora": Case("v3", rslora=True),
    "v3, dora": Case("v3", dora=True),
    "v2-lite": Case("v2-lite"),
    "v2-lite, dora": Case("v2-lite", dora=True, modules=ATTENTION),
    "v2-dense": Case("v2-dense"),
    "mixtral": Case("mixtral"),
    "mixtral, dora": Case("mixtral", dora=True),
    "mixtral-wide": Case("mixtral-wide", rslora=True),
}


def logits(path: Path, *adapters: tuple[Path, float], **options: object) -> NDArray[np.float32]:
    with localds.load(path, "cpu", adapters=adapters, **options) as model:  # type: ignore[arg-type]
        return model.logits(IDS)


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """The bounds of tests/test_oracle.py."""
    difference = np.abs(ours - theirs)
    assert difference.max() < 1e-4 * np.abs(theirs).max()
    assert difference.mean() < 1e-4 * np.abs(theirs).mean()


@pytest.mark.parametrize("name", CASES)
def test_adapted_model_is_the_merged_checkpoint(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain = case.gguf(tmp_path / "plain.gguf")
    expected = logits(case.gguf(tmp_path / "merged.gguf", adapted=True))
    folder = case.folder(tmp_path / "adapter")
    assert_close(logits(plain, (folder, 1.0)), expected)
    assert np.abs(logits(plain) - expected).max() > 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("dora", [False, True])
def test_other_forms_of_the_file(tmp_path: Path, dora: bool) -> None:
    """attn_kv_b in one tensor, and gate and up of experts in one."""
    case = Case("v3", dora=dora)
    plain = case.gguf(tmp_path / "plain.gguf")
    expected = logits(case.gguf(tmp_path / "merged.gguf", adapted=True))
    folder = case.folder(tmp_path / "adapter")
    from checkpoints import golden_config

    weights = case.weights(adapted=False)
    legacy = legacy_kv_b(plain, tmp_path / "legacy.gguf", golden_config("v3"), weights)
    fused = fused_gate_up(plain, tmp_path / "fused.gguf")
    # The legacy form keeps its keys in F16 unless they are F32, so the bounds are the same.
    for path in (legacy, fused):
        assert_close(logits(path, (folder, 1.0)), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_a_part_of_the_change(tmp_path: Path, dora: bool) -> None:
    case = Case("v2-lite", modules=ATTENTION, dora=dora)
    plain = case.gguf(tmp_path / "plain.gguf")
    folder = case.folder(tmp_path / "adapter")
    half = logits(case.gguf(tmp_path / "half.gguf", 0.5, adapted=True))
    assert_close(logits(plain, (folder, 0.5)), half)
    np.testing.assert_array_equal(logits(plain, (folder, 0.0)), logits(plain))


def test_adapters_add_up(tmp_path: Path) -> None:
    first, second = Case("v3", modules=ATTENTION), Case("v3", modules=DENSE)
    plain = first.gguf(tmp_path / "plain.gguf")
    both = Case("v3", modules=f"{ATTENTION}|{DENSE}")
    expected = logits(both.gguf(tmp_path / "both.gguf", adapted=True))
    folders = [case.folder(tmp_path / str(n)) for n, case in enumerate((first, second))]
    assert_close(logits(plain, *((folder, 1.0) for folder in folders)), expected)
    # Of one matrix, too: twice a half is the whole.
    whole = logits(plain, (folders[0], 1.0))
    assert_close(logits(plain, (folders[0], 0.5), (folders[0], 0.5)), whole)


def test_the_change_of_one_matrix() -> None:
    rng = np.random.default_rng(1)
    w, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((5, 7), (2, 7), (5, 2)))
    np.testing.assert_allclose(
        merged(w, {"a": a, "b": b}, 1.5), w + 1.5 * (b @ a), rtol=1e-5, atol=1e-6
    )
    m = np.arange(1, 6, dtype=np.float32)
    dora = merged(w, {"a": a, "b": b, "m": m}, 1.5)
    np.testing.assert_allclose(np.linalg.norm(dora, axis=1), m, rtol=1e-5)
    empty = merged(np.zeros_like(w), {"a": a, "b": np.zeros_like(b), "m": m}, 1.5)
    np.testing.assert_array_equal(empty, 0)  # a row without a direction stays without one


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Case, Path, Path]:
    """A case, a Q8_0 file of its model, and the adapter's folder."""
    case = Case("kimi-k2")
    plain = case.gguf(tmp_path / "f32.gguf")
    path = tmp_path / "q8.gguf"
    convert(open_source(str(plain)), path, recipe="Q8_0")
    return case, path, case.folder(tmp_path / "adapter")


def test_quantized_weights_become_q8_0(quantized: tuple[Case, Path, Path], tmp_path: Path) -> None:
    case, path, folder = quantized
    expected = GGUFFile.open(case.gguf(tmp_path / "merged.gguf", adapted=True))
    gguf = GGUFFile.open(path)
    base = {name: tensor.type for name, tensor in gguf.tensors.items()}
    applied = apply(gguf, [(read_adapter(folder, Base.of(gguf)), 1.0)])
    applied.fill()
    changed = [name for name in gguf.tensors if name in applied.base]
    assert len(changed) == len(gguf.tensors) - sum("norm" in n or "bias" in n for n in base) - 2
    for name in changed:
        tensor, exact = gguf.tensors[name], expected.tensors[name]
        kept = base[name] in (GGMLType.F32, GGMLType.F16)
        assert tensor.type == (base[name] if kept else GGMLType.Q8_0)
        ours, theirs = values(tensor), values(exact)
        error = np.sqrt(np.square(ours - theirs).sum() / np.square(theirs).sum())
        assert error < 0.015, name  # twice rounded to 8 bits


def values(tensor: localds.gguf.Tensor) -> NDArray[np.float32]:
    rows = tensor.n_elements // tensor.shape[0]
    return _native.dequantize(_native.Matrix(tensor.type, rows, tensor.shape[0], 1, tensor.data))


def test_plans_count_what_lies_in_memory(quantized: tuple[Case, Path, Path]) -> None:
    _, path, folder = quantized
    with localds.load(path, "cpu") as plain:
        before = plain.placement.plan
    with localds.load(path, "cpu", adapters=[(folder, 0.75)]) as model:
        after = model.placement.plan
        assert model.adapters == (("adapter", 0.75),)
        assert after.weights == sum(tensor.nbytes for tensor in model.gguf.tensors.values())
    assert after.parts.keys() == before.parts.keys()


def test_what_is_kept_of_a_context_belongs_to_the_adapters(
    quantized: tuple[Case, Path, Path],
) -> None:
    _, path, folder = quantized
    marks = []
    for adapters in ([], [(folder, 1.0)], [(folder, 0.5)], [(folder, 1.0), (folder, 1.0)]):
        with localds.load(path, "cpu", adapters=adapters) as model:
            marks.append(model.fingerprint)
    assert len(set(marks)) == len(marks)
    with localds.load(path, "cpu", adapters=[(folder, 1.0)]) as model:
        assert model.fingerprint == marks[1]


SLOTS = 13  # the trunk and about half of the experts


def test_experts_on_disk_cannot_be_adapted(tmp_path: Path) -> None:
    case = Case("kimi-k2", modules=EXPERTS)
    plain = case.gguf(tmp_path / "plain.gguf")
    folder = case.folder(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"routed experts.*--ram.*--merge"):
        localds.load(plain, "cpu", ram=budget_for(plain, SLOTS), adapters=[(folder, 1.0)])


def test_a_trunk_can_be_adapted_with_experts_on_disk(tmp_path: Path) -> None:
    case = Case("kimi-k2", modules="|".join((ATTENTION, DENSE, ROUTER)))
    plain = case.gguf(tmp_path / "plain.gguf")
    expected = logits(case.gguf(tmp_path / "merged.gguf", adapted=True))
    folder = case.folder(tmp_path / "adapter")
    with localds.load(
        plain, "cpu", ram=budget_for(plain, SLOTS), adapters=[(folder, 1.0)]
    ) as model:
        assert not model.placement.resident
        assert_close(model.logits(IDS), expected)


def test_progress_is_shown(quantized: tuple[Case, Path, Path]) -> None:
    _, path, folder = quantized
    seen: list[tuple[int, int]] = []
    with localds.load(
        path, "cpu", adapters=[(folder, 1.0)], on_progress=lambda *at: seen.append(at)
    ):
        pass
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_a_scale_that_no_type_holds(quantized: tuple[Case, Path, Path]) -> None:
    _, path, folder = quantized
    with pytest.raises(AdapterError, match=r"the scale is too large"):
        localds.load(path, "cpu", adapters=[(folder, 1e30)])
    with pytest.raises(AdapterError, match=r"the scale inf is no number"):
        localds.load(path, "cpu", adapters=[(folder, float("inf"))])


def test_the_file_is_not_changed(quantized: tuple[Case, Path, Path]) -> None:
    _, path, folder = quantized
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    logits(path, (folder, 1.0))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("kinds", [EXPERTS, ROUTER, EVERYTHING])
def test_chat_answers_differently(
    quantized: tuple[Case, Path, Path], tmp_path: Path, kinds: str
) -> None:
    case, path, _ = quantized
    folder = Case(case.variant, modules=kinds).folder(tmp_path / "chosen")

    def answer(*options: str) -> str:
        command = [sys.executable, "-P", "-m", "localds", "chat", str(path), "--raw", "-p", "abc"]
        done = subprocess.run(
            [*command, "-n", "12", "--temp", "0", "--device", "cpu", *options],
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            # What is used last is remembered there.
            env=os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")},
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode(errors="replace")

    assert answer() == answer("--adapter", f"{folder}:0")
    assert answer() != answer("--adapter", str(folder))

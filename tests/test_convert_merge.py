"""`localds convert --merge`: what is changed, what is kept, and how well the result agrees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapter_cases import ATTENTION, DENSE, EVERYTHING, Case
from checkpoints import token_ids

import localds
from convert import CheckpointError, Job, StoppedError, convert, merge_adapters, open_source
from convert.recipes import AS_STORED
from convert.source import Target
from localds.adapters import AdapterError
from localds.gguf import GGMLType, GGUFFile

IDS = token_ids(9, 24)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "localds", "convert", *map(str, arguments)],
        capture_output=True,
        check=False,
        text=True,
    )


@pytest.mark.parametrize(
    "case", [Case("v3"), Case("v3", dora=True), Case("mixtral")], ids=["v3", "dora", "mixtral"]
)
def test_merged_file_is_the_merged_checkpoint(tmp_path: Path, case: Case) -> None:
    """In float32, tensor by tensor."""
    plain = case.gguf(tmp_path / "plain.gguf")
    expected = GGUFFile.open(case.gguf(tmp_path / "expected.gguf", adapted=True))
    folder = case.folder(tmp_path / "tuned")
    done = command(plain, "--merge", folder, "-o", tmp_path / "merged.gguf")
    assert done.returncode == 0, done.stderr
    merged, before = GGUFFile.open(tmp_path / "merged.gguf"), GGUFFile.open(plain)
    assert list(merged.tensors) == list(before.tensors)
    for name, tensor in merged.tensors.items():
        ours, theirs = (t.data.view(np.float32) for t in (tensor, expected.tensors[name]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    assert merged.text("general.name") == before.text("general.name") + " + tuned"
    assert merged.strings("localds.adapters")[0].startswith("tuned 1.0 ")
    changed = {"general.name", "localds.adapters", "localds.recipe"}
    for key in before.metadata:
        if key not in changed:
            np.testing.assert_array_equal(merged.metadata[key], before.metadata[key], key)


def test_types_stay_and_what_is_not_adapted_is_copied(tmp_path: Path) -> None:
    case = Case("kimi-k2", modules=ATTENTION)
    convert(open_source(str(case.gguf(tmp_path / "f32.gguf"))), tmp_path / "q.gguf", recipe="Q4_0")
    folder = case.folder(tmp_path / "tuned")
    source = open_source(str(tmp_path / "q.gguf"), keep_types=True)
    merged = merge_adapters(source, [(folder, 1.0)])
    convert(merged, tmp_path / "merged.gguf", recipe=AS_STORED)
    before, after = (GGUFFile.open(tmp_path / name) for name in ("q.gguf", "merged.gguf"))
    assert after.integer("general.file_type") == before.integer("general.file_type")
    for name, tensor in after.tensors.items():
        assert tensor.type is before.tensors[name].type
        adapted = "attn_" in name and "norm" not in name
        assert (tensor.data.tobytes() == before.tensors[name].data.tobytes()) != adapted, name
    assert any(tensor.type is GGMLType.Q4_0 for tensor in after.tensors.values())


def test_merged_and_adapted_runs_agree(tmp_path: Path) -> None:
    """Within what rounding the merged tensors to Q8_0 costs."""
    case = Case("v3", modules=f"{ATTENTION}|{DENSE}")
    plain = case.gguf(tmp_path / "plain.gguf")
    convert(open_source(str(plain)), tmp_path / "q8.gguf", recipe="Q8_0")
    folder = case.folder(tmp_path / "tuned")
    assert (
        command(
            tmp_path / "q8.gguf", "--merge", f"{folder}:0.5", "-o", tmp_path / "merged.gguf"
        ).returncode
        == 0
    )
    with localds.load(tmp_path / "merged.gguf", "cpu") as model:
        merged = model.logits(IDS)
    with localds.load(tmp_path / "q8.gguf", "cpu", adapters=[(folder, 0.5)]) as model:
        adapted = model.logits(IDS)
    with localds.load(tmp_path / "q8.gguf", "cpu") as model:
        without = model.logits(IDS)
    # Rows of 40, 24 and 96 values are F16 in the file, and so in both.
    np.testing.assert_allclose(merged, adapted, atol=1e-3 * np.abs(adapted).max())
    assert np.abs(without - adapted).max() > 0.1 * np.abs(adapted).max()


def test_another_type_can_be_chosen(tmp_path: Path) -> None:
    case = Case("v3")
    plain = case.gguf(tmp_path / "plain.gguf")
    folder = case.folder(tmp_path / "tuned")
    done = command(
        plain, "--merge", folder, "--type", "Q8_0", "-o", tmp_path / "m.gguf", "--verify"
    )
    assert done.returncode == 0, done.stderr
    expected = case.gguf(tmp_path / "expected.gguf", adapted=True)
    convert(open_source(str(expected)), tmp_path / "expected-q8.gguf", recipe="Q8_0")
    ours, theirs = (GGUFFile.open(tmp_path / n).tensors for n in ("m.gguf", "expected-q8.gguf"))
    for name, tensor in ours.items():
        assert tensor.type is theirs[name].type


def test_a_checkpoint_can_be_merged_at_once(tmp_path: Path) -> None:
    case = Case("mixtral")
    case.gguf(tmp_path / "plain.gguf")
    expected = GGUFFile.open(case.gguf(tmp_path / "expected.gguf", adapted=True))
    source = open_source(str(tmp_path / "plain.checkpoint"))
    merged = merge_adapters(source, [(case.folder(tmp_path / "tuned"), 1.0)])
    convert(merged, tmp_path / "m.gguf", recipe="F32")
    for name, tensor in GGUFFile.open(tmp_path / "m.gguf").tensors.items():
        ours, theirs = (t.data.view(np.float32) for t in (tensor, expected.tensors[name]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_merge_resumes_with_the_same_adapter_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("v3", modules=EVERYTHING)
    plain = case.gguf(tmp_path / "plain.gguf")
    folder = case.folder(tmp_path / "tuned")

    def job(scale: float) -> Job:
        source = open_source(str(plain), keep_types=True)
        merged = merge_adapters(source, [(folder, scale)])
        return Job.plan(merged, tmp_path / "m.gguf", recipe=AS_STORED)

    whole = job(1.0).run()[0].rename(tmp_path / "whole.gguf")
    blocks = Target.blocks

    def failing(self: Target) -> object:
        if self.name == "blk.1.ffn_gate_shexp.weight":
            raise OSError(5, "Input/output error")
        return blocks(self)

    with monkeypatch.context() as patch:
        patch.setattr(Target, "blocks", failing)
        with pytest.raises(StoppedError):
            job(1.0).run()
    assert (tmp_path / "m.gguf.part").exists()
    with pytest.raises(CheckpointError, match="resume"):
        job(0.5).run(resume=True)
    assert job(1.0).run(resume=True)[0].read_bytes() == whole.read_bytes()


def test_another_models_adapter_is_refused(tmp_path: Path) -> None:
    folder = Case("mixtral").folder(tmp_path / "other")
    plain = Case("v3").gguf(tmp_path / "plain.gguf")
    done = command(plain, "--merge", folder, "-o", tmp_path / "m.gguf")
    assert done.returncode == 1
    assert "belongs to another model" in done.stderr or "it adapts" in done.stderr
    assert not list(tmp_path.glob("m.gguf*"))
    with pytest.raises(AdapterError, match="there is no such adapter"):
        merge_adapters(open_source(str(plain)), [(tmp_path / "absent", 1.0)])

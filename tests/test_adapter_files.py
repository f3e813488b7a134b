"""Files of adapters: PEFT's own, what is written and read again, and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from adapter_cases import ATTENTION, DENSE, EXPERTS, ROUTER, Case, base_of
from checkpoints import GOLDEN, VARIANTS, golden_config, write_variant
from derive_gguf import fused_gate_up, legacy_kv_b

import localds
from convert import convert_checkpoint
from localds.adapters import (
    Adapter,
    AdapterError,
    Base,
    inert_in_llama_cpp,
    parse_adapter,
    read_adapter,
    targets_of,
    write_gguf_adapter,
    write_peft,
)
from localds.gguf import GGUFFile

if TYPE_CHECKING:
    from localds.adapters import Tree

ADAPTERS = GOLDEN / "adapters"
VARIANT_OF = {
    "v3": "v3",
    "v2-lite-dora": "v2-lite",
    "mixtral-rslora": "mixtral",
    "mixtral-single": "mixtral",
    "v3-single": "v3",
}


@pytest.mark.parametrize("name", VARIANT_OF)
def test_adapters_that_peft_wrote(tmp_path: Path, name: str) -> None:
    """With them the model has the logits that it has in PEFT (tests/make_adapter_golden.py)."""
    variant = VARIANT_OF[name]
    path = tmp_path / "model.gguf"
    convert_checkpoint(write_variant(variant, tmp_path / "m"), path, pre=VARIANTS[variant].pre)
    golden = np.load(ADAPTERS / name / "logits.npz")
    with localds.load(path, "cpu", adapters=[(ADAPTERS / name, 1.0)]) as model:
        difference = np.abs(model.logits(golden["ids"]) - golden["logits"])
    assert difference.max() < 1e-4 * np.abs(golden["logits"]).max()
    assert difference.mean() < 1e-4 * np.abs(golden["logits"]).mean()


def assert_equal(ours: Tree, theirs: Tree) -> None:
    assert ours.keys() == theirs.keys()
    for name, pair in theirs.items():
        assert ours[name].keys() == pair.keys()
        for part, array in pair.items():
            np.testing.assert_array_equal(ours[name][part], array, f"{name} {part}")


CASES = {
    "v3": Case("v3"),
    "rslora": Case("v3", rslora=True),
    "dora": Case("v3", dora=True),
    "mixtral": Case("mixtral"),
    "mixtral, dora": Case("mixtral", dora=True),
    "experts alone": Case("v2", modules=EXPERTS),
    "down alone": Case("v2", modules=r"mlp\.experts\.\d+\.down_proj"),
    "up alone": Case("v2", modules=r"mlp\.experts\.\d+\.up_proj"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base = base_of(tmp_path, case)
    adapter = read_adapter(case.folder(tmp_path / "adapter"), base)
    notes = write_peft(tmp_path / "again" / "adapter", adapter, base)
    again = read_adapter(tmp_path / "again" / "adapter" / "adapter_model.safetensors", base)
    assert_equal(again.tree, adapter.tree)
    assert (again.config, again.name) == (adapter.config, "adapter")
    assert (again.base_model, again.revision) == ("someone/tiny", "abc")
    assert again.scale == pytest.approx(case.scale)
    assert bool(notes) == case.dora


def test_ranks_and_scales_of_single_tensors_are_kept(tmp_path: Path) -> None:
    case = Case("v3", modules=ATTENTION)
    base = base_of(tmp_path, case)
    tree = dict(read_adapter(case.folder(tmp_path / "adapter"), base).tree)
    for name in ("blk.0.attn_q_a", "blk.2.attn_output"):
        tree[name] = {"a": tree[name]["a"][:2], "b": tree[name]["b"][:, :2]}
    adapter = Adapter("mixed", read_adapter(tmp_path / "adapter", base).config, tree)
    write_peft(tmp_path / "mixed", adapter, base)
    patterns = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert patterns["rank_pattern"] == {
        "model.layers.0.self_attn.q_a_proj": 2,
        "model.layers.1.self_attn.q_a_proj": 3,
        "model.layers.2.self_attn.q_a_proj": 3,
        "model.layers.0.self_attn.o_proj": 3,
        "model.layers.1.self_attn.o_proj": 3,
        "model.layers.2.self_attn.o_proj": 2,
    }
    assert_equal(read_adapter(tmp_path / "mixed", base).tree, tree)
    write_gguf_adapter_of(tmp_path, adapter, base)


def write_gguf_adapter_of(tmp_path: Path, adapter: Adapter, base: Base) -> None:
    """Without attn_kv_b, which a GGUF adapter cannot hold."""
    tree = {name: pair for name, pair in adapter.tree.items() if "kv_b" not in name}
    kept = Adapter(adapter.name, adapter.config, tree)
    write_gguf_adapter(tmp_path / "mixed.gguf", kept, base)
    again = read_adapter(tmp_path / "mixed.gguf", base)
    for name, pair in tree.items():
        ours = again.scale * again.tree[name]["b"] @ again.tree[name]["a"]
        np.testing.assert_allclose(ours, adapter.scale * pair["b"] @ pair["a"], atol=1e-6)


def test_targets_are_named_for_the_layers_that_are_adapted(tmp_path: Path) -> None:
    case = Case("v3", modules=f"{ATTENTION}|{DENSE}|{ROUTER}")
    case.parts = {name: parts for name, parts in case.parts.items() if ".0." not in name}
    base = base_of(tmp_path, case)
    adapter = read_adapter(case.folder(tmp_path / "adapter"), base)
    write_peft(tmp_path / "again", adapter, base)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (1, 2)
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    )
    assert config["target_parameters"] == ["mlp.gate.weight"] + [
        f"mlp.shared_experts.{name}_proj.weight" for name in ("down", "gate", "up")
    ]


def forms(tmp_path: Path) -> dict[str, Base]:
    """The forms of one model's file."""
    case = Case("v3")
    plain = case.gguf(tmp_path / "plain.gguf")
    weights = case.weights(adapted=False)
    legacy = legacy_kv_b(plain, tmp_path / "legacy.gguf", golden_config("v3"), weights)
    fused = fused_gate_up(plain, tmp_path / "fused.gguf")
    return {path.stem: Base.of(GGUFFile.open(path)) for path in (plain, legacy, fused)}


@pytest.mark.parametrize("rslora", [False, True])
def test_gguf_adapters_of_every_form_of_the_file(tmp_path: Path, rslora: bool) -> None:
    case = Case("v3", rslora=rslora)
    folder = case.folder(tmp_path / "adapter")
    for form, base in forms(tmp_path).items():
        adapter = read_adapter(folder, base)
        path = tmp_path / f"{form}-adapter.gguf"
        if form != "legacy":
            with pytest.raises(AdapterError, match=r"attn_kv_b.*attn_k_b and attn_v_b; merge it"):
                write_gguf_adapter(path, adapter, base)
            tree = {name: pair for name, pair in adapter.tree.items() if "kv_b" not in name}
            adapter = Adapter(adapter.name, adapter.config, tree, adapter.base_model, "abc")
        write_gguf_adapter(path, adapter, base)
        again = read_adapter(path, base)
        assert_equal(again.tree, adapter.tree)
        assert again.scale == pytest.approx(adapter.scale)
        assert (again.base_model, again.revision) == ("someone/tiny", "abc")
        assert again.config.targets == targets_of("deepseek2", adapter.tree)
        with GGUFFile.open(path) as gguf:
            assert gguf.text("general.type") == "adapter"
            assert gguf.text("adapter.type") == "lora"
            assert gguf.number("adapter.lora.alpha") == pytest.approx(adapter.scale * case.rank)
            fused = form == "fused"
            name = "gate_up" if fused else "gate"
            a = gguf.tensors[f"blk.1.ffn_{name}_exps.weight.lora_a"]
            b = gguf.tensors[f"blk.1.ffn_{name}_exps.weight.lora_b"]
            assert a.shape == (64, 3 * (1 + fused), 8)
            assert b.shape == (3 * (1 + fused), 40 * (1 + fused), 8)


def test_dora_has_no_gguf_form(tmp_path: Path) -> None:
    case = Case("mixtral", dora=True)
    base = base_of(tmp_path, case)
    adapter = read_adapter(case.folder(tmp_path / "adapter"), base)
    with pytest.raises(AdapterError, match="no DoRA; merge it"):
        write_gguf_adapter(tmp_path / "adapter.gguf", adapter, base)
    assert not (tmp_path / "adapter.gguf").exists()


def test_what_llama_cpp_ignores(tmp_path: Path) -> None:
    case = Case("v2")
    base = base_of(tmp_path, case)
    adapter = read_adapter(case.folder(tmp_path / "adapter"), base)
    inert = inert_in_llama_cpp(adapter, "deepseek2")
    assert {name.split(".")[2] for name in inert} == {
        "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b",
    }  # fmt: skip
    assert not inert_in_llama_cpp(adapter, "llama")


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("out", "out", 1.0),
        ("out:0.5", "out", 0.5),
        ("a:b:-2", "a:b", -2.0),
        ("C:out", "C:out", 1.0),
        ("out:", "out:", 1.0),
    ],
)
def test_adapters_on_a_command_line(text: str, path: str, scale: float) -> None:
    assert parse_adapter(text) == (Path(path), scale)


def test_a_path_with_a_number_behind_its_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run:2").mkdir()
    assert parse_adapter("run:2") == (Path("run:2"), 1.0)
    assert parse_adapter("run:2:3") == (Path("run:2"), 3.0)
    with pytest.raises(AdapterError, match="finite"):
        parse_adapter("out:inf")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_widths(tmp_path: Path, dtype: Any) -> None:
    case = Case("v2-dense")
    base = base_of(tmp_path, case)
    tensors = {name: array.astype(dtype) for name, array in case.tensors().items()}
    adapter = read_adapter(case.folder(tmp_path / "adapter", tensors), base)
    key = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    expected = tensors[key].astype(np.float32)
    np.testing.assert_array_equal(adapter.tree["blk.1.attn_output"]["a"], expected)


LOADED = {
    "v3": Case("v3"),
    "v3, rslora": Case("v3", rslora=True),
    "v2": Case("v2"),
    "v2-lite, dora": Case("v2-lite", modules=ATTENTION, dora=True),
    "mixtral": Case("mixtral"),
    "mixtral, dora": Case("mixtral", modules=ATTENTION, dora=True),
    "glm-4.7-flash": Case("glm-4.7-flash"),
    "youtu": Case("youtu"),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", LOADED)
def test_peft_loads_what_is_written(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from make_adapter_golden import IDS, base_model, logits

    case = LOADED[name]
    plain = case.gguf(tmp_path / "plain.gguf")
    base = Base.of(GGUFFile.open(plain))
    adapter = read_adapter(case.folder(tmp_path / "adapter"), base)
    assert not write_peft(tmp_path / "ours", adapter, base)
    tuned = base_model(case.variant, tmp_path / "model")
    expected = logits(peft.PeftModel.from_pretrained(tuned, tmp_path / "ours"))
    with localds.load(plain, "cpu", adapters=[(tmp_path / "ours", 1.0)]) as model:
        difference = np.abs(model.logits(IDS) - expected)
    assert difference.max() < 1e-4 * np.abs(expected).max()
    assert difference.mean() < 1e-4 * np.abs(expected).mean()


@pytest.mark.oracle
@pytest.mark.parametrize("name", VARIANT_OF)
def test_golden_adapters_are_current(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from make_adapter_golden import write_golden

    write_golden(name, tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name / file).read_bytes() == (ADAPTERS / name / file).read_bytes()
    kept, made = (np.load(folder / name / "logits.npz") for folder in (ADAPTERS, tmp_path))
    np.testing.assert_allclose(made["logits"], kept["logits"], atol=1e-5)

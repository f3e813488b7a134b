"""Sources of every layout: stacked experts, extra layers, other parts, and GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    VARIANTS,
    golden_config,
    golden_shapes,
    make_weights,
    save_shards,
    weight,
    write_checkpoint,
    write_variant,
)
from quantized_checkpoints import Float8, PackedIntegers, quantize_checkpoint

import localds
from convert import Checkpoint, CheckpointError
from convert.open import open_source
from convert.tensors import omissions, plan
from localds import _native
from localds.gguf import GGMLType, GGUFFile
from localds.gguf.write import TensorInfo, lay_out, write_gguf
from localds.memory.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from quantized_checkpoints import Form

    from convert.source import Target

    Floats = NDArray[np.float32]


def whole(target: Target) -> Floats:
    """All data of a target, read in blocks."""
    return np.concatenate([block.data for block in target.blocks()]).reshape(target.shape)


def contents(targets: list[Target]) -> dict[str, bytes]:
    """Shape and data of each target, to be compared."""
    return {target.name: str(target.shape).encode() + whole(target).tobytes() for target in targets}


# Stacked experts


def stack_experts(weights: dict[str, Floats], block: str, names: list[str]) -> dict[str, Floats]:
    """The weights as transformers holds them, gate above up; `names` are gate, up, down."""
    stacked = {name: data for name, data in weights.items() if ".experts." not in name}
    for layer in {name.split(".mlp")[0].split(".block")[0] for name in weights.keys() - stacked}:
        experts = f"{layer}.{block}.experts."
        count = sum(name.startswith(experts) for name in weights) // 3
        gate, up, down = (
            np.stack([weights[f"{experts}{i}.{name}.weight"] for i in range(count)])
            for name in names
        )
        stacked[experts + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        stacked[experts + "down_proj"] = down
    return stacked


@pytest.mark.parametrize(
    ("variant", "block", "names"),
    [
        ("v3", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", "block_sparse_moe", ["w1", "w3", "w2"]),
    ],
)
@pytest.mark.parametrize("form", [None, Float8(block=(8, 16)), Float8(block=None)])
def test_stacked_experts(
    tmp_path: Path, variant: str, block: str, names: list[str], form: Form | None
) -> None:
    weights = make_weights(golden_shapes(variant), VARIANTS[variant].seed)
    config = golden_config(variant)
    stacked: dict[str, Any] = stack_experts(weights, block, names)
    values = stacked
    if form is not None:
        stacked, values = quantize_checkpoint(stacked, form)
        config["quantization_config"] = form.config()
    # What the stacks stand for, as separate matrices.
    for name in [name for name in values if ".experts." in name]:
        data, experts = values[name], name.rsplit(".", 1)[0]
        if name.endswith("gate_up_proj"):
            gate, up = np.split(data, 2, axis=1)
            parts = {names[0]: gate, names[1]: up}
        else:
            parts = {names[2]: data}
        for kind, matrices in parts.items():
            for index, matrix in enumerate(matrices):
                weights[f"{experts}.{index}.{kind}.weight"] = matrix
    weights |= {name: data for name, data in values.items() if ".experts." not in name}
    write_checkpoint(tmp_path / "separate", golden_config(variant), weights)
    write_checkpoint(tmp_path / "stacked", config, {})
    save_shards(tmp_path / "stacked", stacked)
    separate, together = (plan(Checkpoint(tmp_path / form)) for form in ("separate", "stacked"))
    assert contents(together) == contents(separate)
    origin = next(t for t in together if t.name == "blk.2.ffn_up_exps.weight").origin(3)
    assert origin == f"model.layers.2.{block}.experts.gate_up_proj"


def test_mixtral_as_transformers_names_it_inside(tmp_path: Path) -> None:
    weights = make_weights(golden_shapes("mixtral"), VARIANTS["mixtral"].seed)
    stacked = stack_experts(weights, "block_sparse_moe", ["w1", "w3", "w2"])
    renamed = {key.replace("block_sparse_moe", "mlp"): data for key, data in stacked.items()}
    one = write_checkpoint(tmp_path / "one", golden_config("mixtral"), weights)
    other = write_checkpoint(tmp_path / "other", golden_config("mixtral"), renamed)
    assert contents(plan(Checkpoint(one))) == contents(plan(Checkpoint(other)))


def test_stack_of_another_orientation(tmp_path: Path) -> None:
    weights = make_weights(golden_shapes("v3"), 1)
    stacked = stack_experts(weights, "mlp", ["gate_proj", "up_proj", "down_proj"])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stacked[name] = stacked[name].swapaxes(1, 2).copy()
    folder = write_checkpoint(tmp_path, golden_config("v3"), stacked)
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \(8, 64, 80\), but"):
        plan(Checkpoint(folder))


# Multi-token prediction


def with_prediction_layer(tmp_path: Path, *, tables: bool = True) -> tuple[Path, dict[str, Floats]]:
    """The "v3" variant with a layer 3 of the published form, and that layer's weights."""
    shapes = golden_shapes("v3")
    extra = {
        name.replace("layers.2.", "layers.3."): shape
        for name, shape in shapes.items()
        if ".layers.2." in name
    }
    layer = "model.layers.3."
    extra |= {layer + "eh_proj.weight": (64, 128), layer + "shared_head.norm.weight": (64,)}
    extra |= {layer + "enorm.weight": (64,), layer + "hnorm.weight": (64,)}
    if tables:
        extra |= {layer + "embed_tokens.weight": (320, 64)}
        extra |= {layer + "shared_head.head.weight": (320, 64)}
    added = {name: weight(7, name, shape) for name, shape in extra.items()}
    config = golden_config("v3") | {"num_nextn_predict_layers": 1}
    folder = write_checkpoint(tmp_path, config, make_weights(shapes, 1) | added)
    return folder, added


def test_prediction_layers_are_left_out(tmp_path: Path) -> None:
    folder, added = with_prediction_layer(tmp_path)
    checkpoint = Checkpoint(folder)
    assert not [target for target in plan(checkpoint) if target.name.startswith("blk.3.")]
    size = sum(data.nbytes for data in added.values()) / 1e9
    assert omissions(checkpoint) == [
        "left out: multi-token prediction, layer 3; --mtp keeps it "
        f"({size:.2f} GB of the checkpoint)"
    ]
    source = open_source(str(folder), pre="deepseek-v3")
    assert source.notes == omissions(checkpoint)
    assert source.metadata["deepseek2.block_count"] == 3


def test_prediction_layers_are_kept(tmp_path: Path) -> None:
    folder, added = with_prediction_layer(tmp_path)
    source = open_source(str(folder), mtp=True, pre="deepseek-v3")
    assert source.notes == []
    assert source.metadata["deepseek2.block_count"] == 4
    assert source.metadata["deepseek2.nextn_predict_layers"] == 1
    kept = {t.name: t for t in source.targets if t.name.startswith("blk.3.")}
    for name, tensor in {
        "eh_proj": "eh_proj",
        "enorm": "enorm",
        "hnorm": "hnorm",
        "embed_tokens": "embed_tokens",
        "shared_head.head": "shared_head_head",
        "shared_head.norm": "shared_head_norm",
    }.items():
        target = kept[f"blk.3.nextn.{tensor}.weight"]
        np.testing.assert_array_equal(whole(target), added[f"model.layers.3.{name}.weight"])
    others = {t.name.replace("blk.2.", "blk.3.") for t in source.targets if "blk.2." in t.name}
    assert kept.keys() == others | {name for name in kept if ".nextn." in name}


def test_prediction_layers_do_not_take_part(tmp_path: Path) -> None:
    """A file that has them computes what one without them does, in the same memory."""
    folder, _ = with_prediction_layer(tmp_path)
    files = []
    for mtp in (False, True):
        source = open_source(str(folder), mtp=mtp, pre="deepseek-v3")
        tensors = {target.name: whole(target) for target in source.targets}
        files.append(tmp_path / f"{mtp}.gguf")
        metadata = {"general.architecture": source.architecture} | dict(source.metadata)
        write_gguf(files[-1], metadata, tensors)
    without, with_them = (localds.load(file) for file in files)
    ids = list(range(40))
    np.testing.assert_array_equal(with_them.logits(ids), without.logits(ids))
    plans = [make_plan(GGUFFile.open(file), without.geometry, 64) for file in files]
    assert plans[0] == plans[1]


def test_prediction_layer_that_shares_its_tables(tmp_path: Path) -> None:
    folder, _ = with_prediction_layer(tmp_path, tables=False)
    names = {target.name for target in plan(Checkpoint(folder), mtp=True)}
    assert "blk.3.nextn.eh_proj.weight" in names
    assert "blk.3.nextn.embed_tokens.weight" not in names


def test_no_prediction_layers_to_keep(tmp_path: Path) -> None:
    folder = write_variant("v2-lite", tmp_path)
    with pytest.raises(CheckpointError, match=r"num_nextn_predict_layers.*leave out --mtp"):
        plan(Checkpoint(folder), mtp=True)


# Kimi-K2.5: a language model among other parts


def test_text_part_of_kimi(tmp_path: Path) -> None:
    weights = make_weights(golden_shapes("kimi-k2"), VARIANTS["kimi-k2"].seed)
    tensors, values = quantize_checkpoint(weights, PackedIntegers())
    vision = {
        "vision_tower.encoder.blocks.0.wqkv.weight": np.ones((48, 16), np.float32),
        "mm_projector.proj.0.weight": np.ones((16, 16), np.float32),
    }
    text = golden_config("kimi-k2") | {"quantization_config": PackedIntegers().config()}
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": text}
    folder = write_checkpoint(tmp_path / "kimi", config, {})
    save_shards(folder, vision | {f"language_model.{name}": d for name, d in tensors.items()})
    plain = write_checkpoint(tmp_path / "plain", golden_config("kimi-k2"), values)
    source = open_source(str(folder), pre="kimi-k2")
    assert source.architecture == "deepseek2"
    assert source.notes == ["left out: what sees images (0.00 GB of the checkpoint)"]
    assert contents(source.targets) == contents(plan(Checkpoint(plain)))


# Open


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder or file; convert takes"):
        open_source(str(tmp_path / "absent"))
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_source(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        open_source(str(tmp_path))


def test_missing_tokenizer(tmp_path: Path) -> None:
    folder = write_variant("v3", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_source(str(folder), pre="deepseek-v3")


# GGUF files


def as_bfloat16(values: Floats) -> NDArray[np.uint8]:
    return values.astype(ml_dtypes.bfloat16).view(np.uint8)


STORED: dict[GGMLType, Callable[[Floats], NDArray[np.uint8]]] = {
    GGMLType.F32: lambda values: values.view(np.uint8),
    GGMLType.F16: lambda values: values.astype(np.float16).view(np.uint8),
    GGMLType.BF16: as_bfloat16,
    GGMLType.Q8_0: lambda values: _native.quantize(GGMLType.Q8_0, values),
}
"""How rows are stored in each type."""


def write_model(path: Path, kind: GGMLType, **more: Any) -> dict[str, Floats]:
    """A GGUF file that is no whole model, with two tensors; returns their values."""
    values = {
        "token_embd.weight": weight(1, "a", (5, 64)),
        "blk.0.ffn_up_exps.weight": weight(2, "b", (3, 7, 32)),
    }
    metadata = {"general.architecture": "deepseek2", "deepseek2.block_count": 1} | more
    layout = lay_out(metadata, [TensorInfo(n, v.shape, kind) for n, v in values.items()])
    with path.open("wb") as stream:
        stream.write(layout.header)
        for data, offset in zip(values.values(), layout.offsets, strict=True):
            stream.seek(offset)
            stream.write(STORED[kind](data.reshape(-1, data.shape[-1])).tobytes())
        stream.truncate(layout.size)
    return values


@pytest.mark.parametrize("kind", STORED)
def test_gguf_source(tmp_path: Path, kind: GGMLType) -> None:
    values = write_model(tmp_path / "m.gguf", kind)
    source = open_source(str(tmp_path / "m.gguf"))
    assert source.architecture == "deepseek2"
    assert [t.name for t in source.targets] == list(values)
    for target in source.targets:
        expected = values[target.name]
        assert (target.shape, target.stored) == (expected.shape, kind.name)
        error = 0.0 if kind is not GGMLType.Q8_0 else np.abs(expected).max() / 250
        np.testing.assert_allclose(whole(target), expected, rtol=0, atol=error)
    experts = source.targets[1]
    np.testing.assert_array_equal(experts.read(2, 3, 5), whole(experts)[2, 3:5])


def test_gguf_metadata_keeps_its_types(tmp_path: Path) -> None:
    more = {
        "general.file_type": 7,
        "quantize.imatrix.file": "x",
        "split.count": np.uint16(1),
        "a.u16": np.uint16(3),
        "a.i32": np.int32(-3),
        "a.f64": np.float64(0.1),
        "a.flag": True,
        "a.number": 0.5,
        "a.bytes": b"\xff\xfe",
        "a.strings": ["x", "ä"],
        "a.flags": np.array([True, False]),
        "a.bytes_array": np.array([1, 2], np.uint8),
    }
    write_model(tmp_path / "m.gguf", GGMLType.F32, **more)
    source = open_source(str(tmp_path / "m.gguf"))
    layout = lay_out(source.metadata, [])
    (tmp_path / "copy.gguf").write_bytes(layout.header)
    before, after = (
        {key: entry.kind for key, entry in GGUFFile.open(path).metadata.entries.items()}
        for path in (tmp_path / "m.gguf", tmp_path / "copy.gguf")
    )
    dropped = {"general.file_type", "quantize.imatrix.file", "split.count"}
    assert after == {key: kind for key, kind in before.items() if key not in dropped}
    assert source.metadata["a.bytes"] == "\udcff\udcfe"


def test_gguf_that_has_lost_much_already(tmp_path: Path) -> None:
    values = weight(1, "a", (4, 64))
    layout = lay_out(
        {"general.architecture": "deepseek2"},
        [TensorInfo("token_embd.weight", values.shape, GGMLType.Q4_0)],
    )
    data = np.zeros(4 * 2 * 18, np.uint8)
    (tmp_path / "m.gguf").write_bytes(layout.header + data.tobytes())
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' is Q4_0; .*--allow-requantize"):
        open_source(str(tmp_path / "m.gguf"))
    (target,) = open_source(str(tmp_path / "m.gguf"), requantize=True).targets
    np.testing.assert_array_equal(whole(target), np.zeros((4, 64)))


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", GGMLType.F32, **{"general.architecture": "gemma3"})
    with pytest.raises(CheckpointError, match="'gemma3' is not one that convert knows: deepseek2"):
        open_source(str(tmp_path / "m.gguf"))

"""Weights of every stored form: what the plan's targets read is what the numbers stand for."""

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
)
from quantized_checkpoints import Float8, PackedIntegers, quantize_checkpoint

from convert import Checkpoint, CheckpointError
from convert.tensors import plan
from localds import _native

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from quantized_checkpoints import Form, Tensors

    from convert.source import Target

    Floats = NDArray[np.float32]

FORMS: dict[str, Form] = {
    "fp8-block": Float8(),
    "fp8-tensor": Float8(block=None),
    "fp8-e5m2": Float8(block=(32, 16), dtype=ml_dtypes.float8_e5m2),
    "compressed-block": Float8("compressed-tensors"),
    "compressed-channel": Float8(
        "compressed-tensors", per_row=True, scale_dtype=ml_dtypes.bfloat16
    ),
    "compressed-tensor": Float8("compressed-tensors", block=None),
    "int4-group": PackedIntegers(),
    "int4-zeros": PackedIntegers(group=8, symmetric=False, scale_dtype=np.float16),
    "int4-channel": PackedIntegers(group=None, symmetric=False),
    "int8-group": PackedIntegers(bits=8, symmetric=False, scale_dtype=np.float32),
}


def write_quantized(
    folder: Path, name: str, form: Form, **edit: Any
) -> tuple[Tensors, dict[str, Floats]]:
    """Write a variant in a form; `edit` replaces or (None) removes tensors. Returns its values."""
    weights = make_weights(golden_shapes(name), VARIANTS[name].seed)
    tensors, values = quantize_checkpoint(weights, form)
    config = golden_config(name) | {"quantization_config": form.config()}
    write_checkpoint(folder, config, {})
    kept = {key: data for key, data in (tensors | edit).items() if data is not None}
    save_shards(folder, kept)
    return tensors, values


def whole(target: Target) -> Floats:
    """All data of a target, read in blocks."""
    return np.concatenate([block.data for block in target.blocks()]).reshape(target.shape)


def assert_same(targets: list[Target], expected: list[Target]) -> None:
    assert [(target.name, target.shape) for target in targets] == [
        (target.name, target.shape) for target in expected
    ]
    for target, other in zip(targets, expected, strict=True):
        np.testing.assert_array_equal(whole(target), whole(other), err_msg=target.name)


# Forms


@pytest.mark.parametrize("variant", ["v3", "mixtral-wide"])
@pytest.mark.parametrize("form", FORMS)
def test_reads_every_form(tmp_path: Path, variant: str, form: str) -> None:
    _, values = write_quantized(tmp_path / "quantized", variant, FORMS[form])
    write_checkpoint(tmp_path / "plain", golden_config(variant), values)
    checkpoint = Checkpoint(tmp_path / "quantized")
    targets = plan(checkpoint)
    assert_same(targets, plan(Checkpoint(tmp_path / "plain")))
    stored = sum(target.source_bytes for target in targets)
    assert stored == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("form", FORMS)
def test_rows_can_be_read_from_anywhere(tmp_path: Path, form: str) -> None:
    write_quantized(tmp_path, "v3", FORMS[form])
    for target in plan(Checkpoint(tmp_path))[:25]:
        data = whole(target).reshape(target.matrices, target.rows, target.columns)
        matrix, rows = target.matrices - 1, target.rows
        for start, stop in ((0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows)):
            part = target.read(matrix, start, stop)
            assert part.dtype == np.float32
            assert part.flags.c_contiguous
            np.testing.assert_array_equal(part, data[matrix, start:stop], err_msg=target.name)


def test_names_what_it_reads(tmp_path: Path) -> None:
    write_quantized(tmp_path, "v3", PackedIntegers())
    targets = {target.name: target for target in plan(Checkpoint(tmp_path))}
    experts = targets["blk.1.ffn_down_exps.weight"]
    assert experts.stored == "INT4"
    assert experts.origin(5) == "model.layers.1.mlp.experts.5.down_proj.weight"
    assert targets["blk.1.attn_k_b.weight"].origin(2) == "model.layers.1.self_attn.kv_b_proj.weight"


# What it refuses

DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.mark.parametrize(
    ("form", "edit", "message"),
    [
        (Float8(), {DOWN + "_scale_inv": None}, rf"'{DOWN}' is quantized, but {DOWN}_scale_inv or"),
        (Float8(), {DOWN + "_scale_inv": np.ones((3, 2), np.float32)}, r"neither one scale.*24 x"),
        (Float8(), {DOWN + "_scale_inv": np.ones(1, np.int32)}, r"scale_inv' has dtype I32"),
        (Float8(), {DOWN: np.ones((64, 40), np.int8)}, rf"'{DOWN}' has dtype I8; convert reads"),
        (Float8(), {DOWN: np.ones((64, 41), np.float32)}, rf"'{DOWN}' has shape \(64, 41\), but"),
        (PackedIntegers(), {DOWN + "_scale": None}, rf"is quantized, but {DOWN}_scale is not"),
        (PackedIntegers(), {DOWN + "_packed": np.ones((64, 6), np.int32)}, r"do not make a weight"),
        (PackedIntegers(), {DOWN + "_packed": np.ones((64, 5), np.int16)}, r"has dtype I16 for"),
        (
            PackedIntegers(symmetric=False),
            {DOWN + "_zero_point": None},
            rf"is quantized, but {DOWN}_zero_point is not",
        ),
        (
            PackedIntegers(symmetric=False),
            {DOWN + "_zero_point": np.ones((9, 3), np.int32)},
            r"the zeros for scales of shape \(64, 3\) would be I32 \(8, 3\)",
        ),
    ],
)
def test_damaged_weights(tmp_path: Path, form: Form, edit: Tensors, message: str) -> None:
    write_quantized(tmp_path, "v3", form, **edit)
    with pytest.raises(CheckpointError, match=message):
        plan(Checkpoint(tmp_path))


def weights_of(**change: Any) -> dict[str, Any]:
    config = PackedIntegers().config()
    config["config_groups"]["group_0"]["weights"] |= change
    return config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'; convert undoes fp8 and"),
        ({}, "quant_method ''"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        (PackedIntegers().config() | {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        (PackedIntegers().config() | {"format": "naive-quantized"}, "'naive-quantized' and type"),
        (weights_of(num_bits=3), "integers of 3 bits"),
        (weights_of(strategy="tensor"), "scale per tensor"),
        (weights_of(group_size=0), "group_size 0"),
    ],
)
def test_unknown_quantization(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, golden_config("v3") | {"quantization_config": section}, {})
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    write_quantized(tmp_path, "v3", Float8())
    target = max(plan(Checkpoint(tmp_path)), key=lambda target: target.source_bytes)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="was cut short while it was being read"):
        whole(target)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read tensor .*No such file"):
        whole(target)


# Native decoders


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
    ],
)
def test_widen_decodes_every_value(name: str, dtype: Any) -> None:
    width = np.dtype(dtype).itemsize
    codes = np.arange(256**width).astype(f"<u{width}")
    out = np.empty(codes.size, np.float32)
    _native.widen(name, codes.view(np.uint8), out)
    np.testing.assert_array_equal(out, codes.view(dtype).astype(np.float32))


def test_native_decoders_check_sizes() -> None:
    raw, floats = np.zeros((4, 6), np.uint8), np.ones((2, 2), np.float32)
    out = np.empty((4, 6), np.float32)
    words = np.zeros((4, 1), np.uint32)
    with pytest.raises(ValueError, match="widen: type 'I8' is not one of"):
        _native.widen("I8", raw[0], out[0])
    with pytest.raises(ValueError, match="6 bytes are not 6 BF16 values"):
        _native.widen("BF16", raw[0], out[0])
    with pytest.raises(ValueError, match="BF16 values are not 8 bits wide"):
        _native.scale_fp8("BF16", raw, floats, 2, 3, 0, out)
    with pytest.raises(ValueError, match="2 x 2 scales do not cover rows up to 5 of 6 columns"):
        _native.scale_fp8("F8_E4M3", raw, floats, 2, 3, 1, out)
    with pytest.raises(ValueError, match="data and out differ"):
        _native.scale_fp8("F8_E4M3", raw[:3], floats, 2, 3, 0, out)
    with pytest.raises(ValueError, match="3 bits; 4 and 8"):
        _native.unpack_integers(3, words, floats, None, 3, out)
    with pytest.raises(ValueError, match="1 words a row do not hold 6 integers of 8 bits"):
        _native.unpack_integers(8, words, floats, None, 3, out)
    with pytest.raises(ValueError, match="scales and zeros must be 4 x 2"):
        _native.unpack_integers(4, words, floats, None, 3, out)


# What the libraries that write these forms read


@pytest.mark.oracle
@pytest.mark.parametrize("form", ["fp8-block", "fp8-tensor"])
def test_transformers_dequantizes_the_same(form: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations import finegrained_fp8

    block = FORMS[form].config()["weight_block_size"]
    tensors, values = FORMS[form].store("w", weight(3, "w", (100, 210)))
    stored = torch.from_numpy(tensors["w"].view(np.uint8)).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(tensors["w_scale_inv"])
    read = finegrained_fp8._dequantize_fp8_weight(stored, scale, block, torch.float32)
    np.testing.assert_array_equal(read.numpy(), values)


@pytest.mark.oracle
@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("fp8")])
def test_compressed_tensors_decompresses_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form = FORMS[name]
    tensors, values = form.store("weight", weight(3, "w", (100, 208)))
    section = form.config()
    scheme = QuantizationScheme(**section["config_groups"]["group_0"])
    state = {key: torch_tensor(torch, data) for key, data in tensors.items()}
    # Their product has the scales' precision; ours is in float32.
    state["weight_scale"] = state["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(section["format"])
    read = compressor.decompress(state, scheme)["weight"]
    np.testing.assert_array_equal(read.float().numpy(), values)


def torch_tensor(torch: Any, data: NDArray[Any]) -> Any:
    """A torch tensor of the same type, which numpy may not know."""
    if data.dtype.kind in "iuf":
        return torch.from_numpy(data)
    width = {1: np.uint8, 2: np.uint16}[data.dtype.itemsize]
    return torch.from_numpy(data.view(width)).view(getattr(torch, data.dtype.name))

"""Tensors of every stored form beside those that llama.cpp's converter makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    VARIANTS,
    golden_config,
    golden_shapes,
    make_weights,
    save_shards,
    write_checkpoint,
    write_variant,
)
from llama_converter import convert_with_llama_cpp, find_converter
from quantized_checkpoints import Float8, PackedIntegers, quantize_checkpoint

from convert import Checkpoint
from convert.tensors import plan
from localds.gguf import GGMLType, GGUFFile

if TYPE_CHECKING:
    from quantized_checkpoints import Form

pytestmark = pytest.mark.interop

# What it reads too: per row or block in 8 bits, groups of 4 bits.
FORMS: dict[str, Form] = {
    "fp8-block": Float8(),
    "compressed-block": Float8("compressed-tensors"),
    "compressed-channel": Float8(
        "compressed-tensors", per_row=True, scale_dtype=ml_dtypes.bfloat16
    ),
    "int4-group": PackedIntegers(group=8),
    "int4-zeros": PackedIntegers(group=8, symmetric=False),
}


def assert_same_tensors(folder: Path, variant: str, output: Path) -> None:
    """Every tensor of our plan equals theirs, bit for bit in float32."""
    pre = VARIANTS[variant].pre
    theirs = GGUFFile.open(
        convert_with_llama_cpp(find_converter(), folder, output, pre=pre)
    ).tensors
    targets = plan(Checkpoint(folder))
    assert {target.name for target in targets} == theirs.keys()
    for target in targets:
        tensor = theirs[target.name]
        assert tensor.type is GGMLType.F32
        assert target.shape == tensor.shape[::-1], target.name
        data = np.concatenate([block.data for block in target.blocks()])
        np.testing.assert_array_equal(
            data.ravel(), tensor.data.view(np.float32), err_msg=target.name
        )


@pytest.mark.parametrize("variant", ["v2-lite", "v3", "youtu", "mixtral-wide"])
def test_floats(tmp_path: Path, variant: str) -> None:
    folder = write_variant(variant, tmp_path / variant)
    assert_same_tensors(folder, variant, tmp_path / "theirs.gguf")


@pytest.mark.parametrize("form", FORMS)
def test_quantized_forms(tmp_path: Path, form: str) -> None:
    weights = make_weights(golden_shapes("v3"), VARIANTS["v3"].seed)
    tensors, _ = quantize_checkpoint(weights, FORMS[form])
    section = {"quantization_config": FORMS[form].config()}
    folder = write_checkpoint(tmp_path / "checkpoint", golden_config("v3") | section, {})
    save_shards(folder, tensors)
    assert_same_tensors(folder, "v3", tmp_path / "theirs.gguf")


def test_text_part_of_kimi(tmp_path: Path) -> None:
    weights = make_weights(golden_shapes("kimi-k2"), VARIANTS["kimi-k2"].seed)
    form = PackedIntegers(group=8)
    tensors, _ = quantize_checkpoint(weights, form)
    text = golden_config("kimi-k2") | {"quantization_config": form.config()}
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": text}
    folder = write_checkpoint(tmp_path / "checkpoint", config, {})
    vision = {"vision_tower.patch_embed.proj.weight": np.ones((16, 16), np.float32)}
    save_shards(folder, vision | {f"language_model.{name}": d for name, d in tensors.items()})
    assert_same_tensors(folder, "kimi-k2", tmp_path / "theirs.gguf")

"""Checkpoints beside llama.cpp's own converter: metadata, and tensors bit for bit.

Needs its source tree (see tests/llama_converter.py), torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints import VARIANTS, write_variant
from llama_converter import convert_with_llama_cpp, find_converter
from metadata_cases import CASES, our_metadata, their_metadata, write_case
from quantized_checkpoints import PackedIntegers
from test_sources import FORMS, whole, write_quantized
from tokenizer_files import glm_files, plain_files

from convert.checkpoint import Checkpoint
from convert.tensors import plan
from localds import _native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convert.source import Target

pytestmark = pytest.mark.interop

# The forms that llama.cpp's converter reads: no scale for a whole tensor, no packed integers with
# a scale for each row, and no rows that end amid a group.
READ = {
    **{form: FORMS[form] for form in FORMS if form.startswith(("fp8", "compressed"))},
    "int4-group": PackedIntegers(group=8),
    "int4-zeros": FORMS["int4-zeros"],
    "int8-group": PackedIntegers(bits=8, group=8, symmetric=False, scale_dtype=np.float32),
}
del READ["compressed-tensor"]


@pytest.fixture(scope="module")
def source() -> Path:
    return find_converter()


@pytest.mark.parametrize("name", CASES)
def test_metadata(name: str, source: Path, tmp_path: Path) -> None:
    case = CASES[name]
    folder = write_case(case, tmp_path)
    output = convert_with_llama_cpp(
        source, folder, tmp_path / "out.gguf", *case.options, pre=case.pre
    )
    assert our_metadata(case, folder) == their_metadata(output) | case.ours


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", VARIANTS)
def test_tensors(name: str, outtype: str, source: Path, tmp_path: Path) -> None:
    folder = write_variant(name, tmp_path / "model")
    files = glm_files if name.startswith("glm") else plain_files
    files(folder)
    output = convert_with_llama_cpp(
        source, folder, tmp_path / "out.gguf", pre=VARIANTS[name].pre, outtype=outtype
    )
    assert_same_tensors(plan(Checkpoint(folder)), output, outtype)


@pytest.mark.parametrize("form", READ)
def test_quantized_sources(form: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_quantized(folder, "v3", READ[form])
    plain_files(folder)
    output = convert_with_llama_cpp(source, folder, tmp_path / "out.gguf", pre="gpt-2")
    assert_same_tensors(plan(Checkpoint(folder)), output, "f32")


def assert_same_tensors(targets: list[Target], output: Path, outtype: str) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(output).tensors}
    assert {target.name for target in targets} == theirs.keys()
    kinds = set()
    for target in targets:
        tensor = theirs[target.name]
        assert tuple(reversed(tensor.shape.tolist())) == target.shape
        kinds.add(tensor.tensor_type.name)
        data = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)
        np.testing.assert_array_equal(encode(target, tensor.tensor_type), data, target.name)
    assert outtype.upper() in kinds


def encode(target: Target, kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Our data in a type of GGUF, as bytes."""
    rows: NDArray[Any] = whole(target).reshape(-1, target.columns)
    floats = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if kind.name in floats:
        return rows.astype(floats[kind.name]).view(np.uint8).reshape(-1)
    return _native.quantize(kind.value, rows).reshape(-1)

"""Checkpoints beside llama.cpp's own converter: metadata, and quantized tensors bit for bit.

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
from tokenizer_files import glm_files, plain_files

from convert.checkpoint import Checkpoint
from convert.tensors import plan
from localds import _native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convert.source import Target

pytestmark = pytest.mark.interop


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


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", VARIANTS)
def test_tensors(name: str, outtype: str, source: Path, tmp_path: Path) -> None:
    folder = write_variant(name, tmp_path / "model")
    files = glm_files if name.startswith("glm") else plain_files
    files(folder)
    output = convert_with_llama_cpp(
        source, folder, tmp_path / "out.gguf", pre=VARIANTS[name].pre, outtype=outtype
    )
    assert_same_tensors(plan(Checkpoint(folder)), output, outtype)


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
    rows: NDArray[Any] = np.concatenate([block.data for block in target.blocks()])
    floats = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if kind.name in floats:
        return rows.astype(floats[kind.name]).view(np.uint8).reshape(-1)
    return _native.quantize(kind.value, rows).reshape(-1)

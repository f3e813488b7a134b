"""Reading checkpoint folders: element types, shards, damage."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import golden_shapes, make_weights, read_weight, write_checkpoint, write_variant
from safetensors.numpy import save_file

from convert import Checkpoint, CheckpointError
from convert.checkpoint import Config


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_reads_every_float_type(tmp_path: Path, dtype: str) -> None:
    values = np.array([[1.5, -2.0, 0.0], [3.25, 1e4, -6e-5]]).astype(ml_dtypes.bfloat16)
    save_file({"a": values.astype(dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = read_weight(Checkpoint(tmp_path), "a")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_reads_shards(tmp_path: Path, shards: int) -> None:
    weights = make_weights(golden_shapes("mixtral"), seed=3)
    write_checkpoint(tmp_path, {}, weights, shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == weights.keys()
    for name, data in weights.items():
        np.testing.assert_array_equal(read_weight(checkpoint, name), data)


def test_unknown_dtype_is_refused_when_read(tmp_path: Path) -> None:
    save_file({"ids": np.arange(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"'ids' has dtype I64; convert reads F64, F32, F16, BF16"
    ):
        read_weight(Checkpoint(tmp_path), "ids")


@pytest.mark.parametrize("keep", [0, 5, 8, 40, 5000])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    file = write_variant("v2-lite", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        Checkpoint(tmp_path)


def test_file_that_lacks_its_last_byte(tmp_path: Path) -> None:
    file = write_variant("v2-lite", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ends at byte .* truncated, download it again"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], "a": 1}, "a": {}}',
        b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}',
        b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}',
        b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},'
        b' "b": {"dtype": "F32", "shape": [12], "data_offsets": [16, 64]}}',
        b'{"a": {"dtype": 3, "shape": [16], "data_offsets": [0, 64]}}',
        b'{"a": {"dtype": "X", "shape": [16], "data_offsets": [64, 0]}}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged header"):
        Checkpoint(tmp_path)


def test_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it claims 150000000 bytes; 100000000 are allowed"):
        Checkpoint(tmp_path)


def test_tensor_of_the_index_that_no_file_has(tmp_path: Path) -> None:
    index = write_variant("mixtral", tmp_path) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.absent"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'model\.absent' is listed in the index, but in no"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (write_variant("mixtral", tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="weight_map is missing"):
        Checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_variant("mixtral", tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*listed in the index"):
        Checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_variant("mixtral", tmp_path)
    first = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(first)
    with pytest.raises(CheckpointError, match="is also in model-00001-of-00002"):
        Checkpoint(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config\.json: no such file; is this a whole checkpoint"
    ):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", "[" * 100_000])
def test_damaged_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: (not valid JSON|expected a JSON)"):
        Checkpoint(tmp_path)


def test_config_values_are_checked() -> None:
    config = Config({"a": True, "b": 3, "c": None, "d": {"e": "x"}})
    with pytest.raises(CheckpointError, match=r"config\.json: a is True, expected int"):
        config.integer("a")
    with pytest.raises(CheckpointError, match=r"config\.json: c is missing"):
        config.integer("c")
    with pytest.raises(CheckpointError, match=r"config\.json: d: e is 'x', expected int or float"):
        config.section("d").number("e")
    assert config.number("b") == 3.0
    assert config.integers("b") == [3]
    assert config.integer("c", 7) == 7
    assert "c" not in config

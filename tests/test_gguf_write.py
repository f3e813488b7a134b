"""Files that we write, as the gguf package and our own parser read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

from localds.gguf import GGMLType
from localds.gguf.metadata import Metadata
from localds.gguf.parse import open_part
from localds.gguf.write import TensorInfo, lay_out, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

METADATA: dict[str, Any] = {
    "general.architecture": "deepseek2",
    "empty": "",
    "yes": True,
    "no": False,
    "count": 4294967295,
    "factor": 0.1,
    "split.no": np.uint16(3),
    "split.tensors.count": np.int32(-7),
    "wide": np.uint64(1 << 40),
    "bytes": b"\xff\xfe",
    "tokens": ["a", "", "Ġthe", "\udcff", "漢"],
    "none": [],
    "types": np.array([1, -3], np.int32),
    "scores": np.array([0.5, -np.inf], np.float32),
}
TENSORS: dict[str, Any] = {
    "one": np.arange(3, dtype=np.float32),
    "two": np.arange(15, dtype=np.float16).reshape(3, 5),
    "three": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(0, 2, 1),
    "integers": np.arange(4, dtype=np.int32),
    "scalar": np.float32(2.5).reshape(()),
}


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", METADATA, TENSORS)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    types = gguf.GGUFValueType
    kinds = {
        "yes": [types.BOOL],
        "count": [types.UINT32],
        "factor": [types.FLOAT32],
        "split.no": [types.UINT16],
        "split.tensors.count": [types.INT32],
        "wide": [types.UINT64],
        "tokens": [types.ARRAY, types.STRING],
        "types": [types.ARRAY, types.INT32],
        "scores": [types.ARRAY, types.FLOAT32],
    }
    for key, kind in kinds.items():
        assert reader.fields[key].types == kind, key
    for key in ("general.architecture", "empty", "yes", "no", "count", "split.no", "wide"):
        assert reader.fields[key].contents() == METADATA[key], key
    assert reader.fields["factor"].contents() == np.float32(0.1)
    assert reader.fields["types"].contents() == [1, -3]
    assert reader.fields["scores"].contents() == [0.5, -np.inf]
    assert [tensor.name for tensor in reader.tensors] == list(TENSORS)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, np.atleast_1d(TENSORS[tensor.name]))
        assert tensor.data_offset % 32 == 0


def test_our_parser_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", METADATA, TENSORS)
    part = open_part(tmp_path / "x.gguf")
    found = Metadata(part.entries)
    assert list(found) == list(METADATA)
    assert found["tokens"] == METADATA["tokens"]
    assert found["none"] == []
    assert found["bytes"] == "\udcff\udcfe"
    assert found["split.tensors.count"] == -7
    for name, data in TENSORS.items():
        raw = part.tensors[name].data.view(data.dtype)
        np.testing.assert_array_equal(raw, np.ascontiguousarray(data).reshape(-1))


def test_places_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    """Byte for byte the same file for what both can say."""
    data = {"a": np.ones((3, 64), np.float32), "b": np.ones((2, 2, 7), np.float32)}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("n", 5)
    writer.add_array("words", ["x", "yz"])
    for name, values in data.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = {"general.architecture": "llama", "n": 5, "words": ["x", "yz"]}
    write_gguf(tmp_path / "ours.gguf", metadata, data)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_layout_of_quantized_tensors() -> None:
    infos = [
        TensorInfo("a", (3, 512), GGMLType.Q4_K),
        TensorInfo("b", (2, 5, 32), GGMLType.Q8_0),
        TensorInfo("c", (4,), GGMLType.F32),
    ]
    layout = lay_out({"general.alignment": 64}, infos)
    start = len(layout.header)
    assert start % 64 == 0
    assert layout.offsets == (start, start + 896, start + 896 + 384)
    assert layout.size == start + 896 + 384 + 64


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, {"a": np.ones(1, np.float32)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no tensors of dtype complex64"):
        write_gguf(path, {}, {"a": np.ones(1, np.complex64)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1 << 32, "is 4294967296; integers are u32"),
        (-1, "is -1; integers are u32"),
        (1e39, "floats are f32"),
        (np.zeros((2, 2), np.float32), "one dimension"),
        (np.zeros(2, np.float16), "dtype float16"),
        (["a", 3], "of type int; lists hold strings"),
        ("\ud800", "no UTF-8 form"),
    ],
)
def test_values_that_do_not_fit(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        lay_out({"some.key": value}, [])
    assert "'some.key'" in str(caught.value)


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([TensorInfo("x" * 64, (1,), GGMLType.F32)], "1 to 63 bytes, not 64"),
        ([TensorInfo("", (1,), GGMLType.F32)], "not 0"),
        ([TensorInfo("x", (1,), GGMLType.F32)] * 2, "two tensors"),
        ([TensorInfo("x", (1, 1, 1, 1, 1), GGMLType.F32)], "1 to 4 dimensions"),
        ([TensorInfo("x", (0, 4), GGMLType.F32)], "at least 1"),
        ([TensorInfo("x", (2, 100), GGMLType.Q4_K)], "not whole Q4_K blocks of 256"),
    ],
)
def test_tensors_that_do_not_fit(infos: list[TensorInfo], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lay_out({}, infos)


def test_alignment_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"general\.alignment is 48"):
        lay_out({"general.alignment": 48}, [])

"""The GGUF reader: what it returns, every file it refuses, and that it says where and why."""

from __future__ import annotations

import gc
import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf as reference
import ggufs
import numpy as np
import pytest
from ggufs import TensorSpec, Typed, tensor

from localds.gguf import GGMLType, GGUFError, GGUFFile
from localds.gguf.scales import find_nonfinite
from localds.gguf.types import BLOCKS, REMOVED

WORDS = ["a", "bc", "ünï", "日本", ""]


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    metadata = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 27,
        "an.i64": -5,
        "a.float": 0.5,
        "a.flag": True,
        "some.ints": np.array([3, 1, 2], np.int16),
        "some.floats": np.array([0.25, 4], np.float64),
        "some.flags": np.array([True, False, True]),
        "some.words": WORDS,
    }
    return ggufs.write(tmp_path / "model.gguf", metadata, [tensor("x", ramp(2, 3, 4))])


def failure(path: Path) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(path)
    assert str(path.parent) in str(caught.value)
    return caught.value


def failure_of(path: Path, raw: bytes) -> GGUFError:
    path.write_bytes(raw)
    return failure(path)


# What is read


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_are_views_at_their_places(tmp_path: Path, version: int, alignment: int) -> None:
    arrays = {"x": ramp(2, 3, 5), "y.weight": -ramp(7), "z": ramp(1)}
    specs = [tensor(name, array) for name, array in arrays.items()]
    path = ggufs.write(tmp_path / "m.gguf", {}, specs, version=version, alignment=alignment)
    with GGUFFile.open(str(path)) as model:
        assert (model.version, model.path, model.file_bytes) == (version, path, path.stat().st_size)
        assert list(model.tensors) == list(arrays)
        for name, array in arrays.items():
            found = model.tensors[name]
            assert found.shape == array.shape[::-1]
            assert (found.name, found.type, found.path) == (name, GGMLType.F32, path)
            assert (found.n_elements, found.nbytes) == (array.size, array.nbytes)
            assert found.offset % alignment == 0
            assert path.read_bytes()[found.offset :][: found.nbytes] == array.tobytes()
            assert found.data.dtype == np.uint8
            assert found.data.ndim == 1
            assert not found.data.flags.writeable
            np.testing.assert_array_equal(found.data.view(np.float32), array.ravel())


def test_values_keep_their_kinds(model: Path) -> None:
    found = GGUFFile.open(model)
    assert found.architecture == "deepseek2"
    assert dict(found.metadata)["an.i64"] == -5
    assert found.metadata["a.float"] == 0.5
    assert found.metadata["a.flag"] is True
    assert found.metadata["some.words"] == WORDS
    assert found.metadata["some.words"] is found.strings("some.words")
    for key, expected in (("some.ints", np.int16), ("some.floats", np.float64)):
        assert found.metadata[key].dtype == expected  # type: ignore[union-attr]
    np.testing.assert_array_equal(found.metadata["some.flags"], [True, False, True])
    assert found.metadata["some.flags"].dtype == np.bool_  # type: ignore[union-attr]
    assert len(found.metadata) == 9
    assert "nothing" not in found.metadata


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("u8", 255),
        ("i8", -128),
        ("u16", 65535),
        ("i16", -32768),
        ("u32", 2**32 - 1),
        ("i32", -(2**31)),
        ("u64", 2**64 - 1),
        ("i64", -(2**63)),
    ],
)
def test_integers_of_every_width(tmp_path: Path, kind: str, value: int) -> None:
    item = Typed(kind, value)
    found = GGUFFile.open(ggufs.write(tmp_path / "m.gguf", {"k": item, "ks": [item, item]}))
    assert found.integer("k") == value
    assert found.number("k") == float(value)
    assert found.integers("k") == [value]
    assert found.integers("ks") == [value, value]


def test_getters(model: Path) -> None:
    found = GGUFFile.open(model)
    assert found.integer("deepseek2.block_count") == 27
    assert found.number("a.float") == 0.5
    assert found.flag("a.flag") is True
    assert found.text("general.architecture") == "deepseek2"
    assert found.integers("some.ints") == [3, 1, 2]
    assert found.strings("some.words") == WORDS
    assert found.has("a.flag")
    assert not found.has("b.flag")


@pytest.mark.parametrize("getter", ["integer", "number", "flag", "text", "integers", "strings"])
def test_missing_key_takes_the_default_or_fails(model: Path, getter: str) -> None:
    get = getattr(GGUFFile.open(model), getter)
    assert get("no.key", 7) == 7
    assert get("no.key", None) is None
    with pytest.raises(GGUFError, match=r"model\.gguf: key 'no\.key' is missing") as caught:
        get("no.key")
    assert caught.value.field == "key 'no.key'"


@pytest.mark.parametrize(
    ("getter", "wrong"),
    [
        ("integer", ["a.float", "a.flag", "general.architecture", "some.ints", "some.words"]),
        ("number", ["a.flag", "general.architecture", "some.floats"]),
        ("flag", ["an.i64", "a.float", "general.architecture", "some.flags"]),
        ("text", ["an.i64", "a.flag", "some.words"]),
        ("integers", ["a.float", "a.flag", "some.floats", "some.flags", "some.words"]),
        ("strings", ["general.architecture", "an.i64", "some.ints"]),
    ],
)
def test_wrong_kind_fails_even_with_a_default(model: Path, getter: str, wrong: list[str]) -> None:
    get = getattr(GGUFFile.open(model), getter)
    for key in wrong:
        with pytest.raises(GGUFError, match=rf"key '{key}' \(offset \d+\): is .*expected"):
            get(key, None)


def test_wrong_kind_names_both_kinds_and_the_place(model: Path) -> None:
    with pytest.raises(GGUFError, match="is array of 3 i16, expected an integer;") as caught:
        GGUFFile.open(model).integer("some.ints")
    at = caught.value.offset
    assert at is not None
    assert model.read_bytes()[at + 8 :].startswith(b"some.ints")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_number_is_finite(tmp_path: Path, value: float) -> None:
    found = GGUFFile.open(ggufs.write(tmp_path / "m.gguf", {"eps": value}))
    with pytest.raises(GGUFError, match="finite"):
        found.number("eps")


def test_text_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    raw = b"ab\xff\xc3"
    path = ggufs.write(tmp_path / "m.gguf", {"one": raw, "more": [b"ok", raw]})
    found = GGUFFile.open(path)
    assert found.text("one").encode("utf-8", "surrogateescape") == raw
    assert found.strings("more")[1].encode("utf-8", "surrogateescape") == raw


def test_every_type_has_the_size_that_the_reference_says() -> None:
    sizes = dict(reference.GGML_QUANT_SIZES)
    # The package still has two floats where ggml's block_q8_1 has had two halves since 2024.
    sizes[reference.GGMLQuantizationType.Q8_1] = (32, 2 + 2 + 32)
    for kind, size in sizes.items():
        assert BLOCKS[GGMLType(int(kind))] == size
        assert GGMLType(int(kind)).name == kind.name
    assert set(BLOCKS) == set(GGMLType)


@pytest.mark.parametrize("kind", list(GGMLType))
def test_tensors_of_every_type_open(tmp_path: Path, kind: GGMLType) -> None:
    raw = bytes(3 * 2 * kind.block_bytes)
    spec = TensorSpec("t", int(kind), (2 * kind.block_elements, 3), raw)
    found = GGUFFile.open(ggufs.write(tmp_path / "m.gguf", {}, [spec])).tensors["t"]
    assert (found.type, found.nbytes) == (kind, len(raw))


def test_scalar_and_empty_tensors(tmp_path: Path) -> None:
    specs = [TensorSpec("one", 0, (), bytes(4)), TensorSpec("none", 0, (8, 0), b"")]
    found = GGUFFile.open(ggufs.write(tmp_path / "m.gguf", {}, specs)).tensors
    assert (found["one"].shape, found["one"].nbytes) == ((1,), 4)
    assert (found["none"].shape, found["none"].nbytes) == ((8, 0), 0)


def test_last_tensor_needs_no_padding(tmp_path: Path) -> None:
    raw = ggufs.build({}, [tensor("x", ramp(3))])
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[: len(raw) - 32 + 12])
    assert GGUFFile.open(path).tensors["x"].nbytes == 12


def test_views_keep_the_map_alive(model: Path) -> None:
    opened = GGUFFile.open(model)
    view = opened.tensors["x"].data
    words = opened.metadata
    opened.close()
    assert not opened.tensors
    assert not opened.metadata
    del opened
    gc.collect()
    np.testing.assert_array_equal(view.view(np.float32), ramp(24))
    assert words["some.words"] == WORDS


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
def test_closing_unmaps(model: Path) -> None:
    with GGUFFile.open(model):
        assert str(model) in Path("/proc/self/maps").read_text()
    gc.collect()
    assert str(model) not in Path("/proc/self/maps").read_text()


def test_large_vocabulary_opens_in_time(tmp_path: Path) -> None:
    words = [f"{'w' * (i % 17)}{i}" for i in range(100_000)]
    metadata = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": np.ones(len(words), np.int32),
        "tokenizer.ggml.merges": [f"{a} {a}" for a in words],
    }
    path = ggufs.write(tmp_path / "m.gguf", metadata)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = GGUFFile.open(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
    assert found.strings("tokenizer.ggml.tokens") == words
    assert found.strings("tokenizer.ggml.merges") == metadata["tokenizer.ggml.merges"]


# Files that cannot be read


def test_no_file(tmp_path: Path) -> None:
    assert "no such file" in str(failure(tmp_path / "absent.gguf"))
    assert "no such file" in str(failure(tmp_path / "absent" / "absent.gguf"))


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    assert "folder" in str(failure(tmp_path / "m.gguf"))


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    assert "regular file" in str(failure(tmp_path / "m.gguf"))


def test_a_file_taken_for_a_folder(model: Path) -> None:
    assert "cannot be opened" in str(failure(model / "m.gguf"))


def test_permission_denied(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "permission denied" in str(failure(model))


def safetensors_bytes() -> bytes:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"GG", "magic"),
        (b"PK\x03\x04" + bytes(99), "zip"),
        (b"\x80\x02}q" + bytes(99), "pickle"),
        (b"\x1f\x8b" + bytes(99), "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<HTML><body>404", "web page"),
        (b'{"error": "not found"}', "JSON"),
        (safetensors_bytes(), "safetensors"),
        (b"tjgg" + bytes(99), "older than GGUF"),
        (bytes(4096), "zeros"),
        (b"hello, world", "instead of b'GGUF'"),
    ],
)
def test_other_files_are_named(tmp_path: Path, raw: bytes, said: str) -> None:
    assert said in str(failure_of(tmp_path / "m.gguf", raw))


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (0, "version 0"),
        (1, "version 1 of GGUF is too old"),
        (4, "version 4 of GGUF is unknown"),
        (3 << 24, "byte order"),
        (2 << 24, "byte order"),
    ],
)
def test_versions(tmp_path: Path, version: int, said: str) -> None:
    error = failure_of(tmp_path / "m.gguf", ggufs.build(version=version))
    assert said in str(error)
    assert (error.field, error.offset) == ("version", 4)


def test_big_endian_file_of_the_reference_writer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = reference.GGUFWriter(path, "llama", endianess=reference.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "byte order" in str(failure(path))


# Damaged headers


def test_counts_are_bounded_by_the_file(tmp_path: Path) -> None:
    for count in (1, 2**31, 2**63 - 1, 2**64 - 1):
        error = failure_of(tmp_path / "m.gguf", ggufs.build(n_tensors=count))
        assert error.field == "tensor count"
        error = failure_of(tmp_path / "m.gguf", ggufs.build(n_entries=count))
        assert error.field == "metadata count"
        assert "incomplete" in str(error)


def raw_entry(entry: bytes) -> bytes:
    """A file whose only key and value are the bytes `entry`."""
    return ggufs.build(n_entries=1) + entry


def test_keys_are_unique_and_not_empty(tmp_path: Path) -> None:
    key = ggufs.string("k") + ggufs.pack_value(1)
    raw = ggufs.build(n_entries=2) + key + key
    error = failure_of(tmp_path / "m.gguf", raw)
    assert (error.field, error.offset) == ("key 'k'", 24 + len(key))
    assert "twice" in str(error)
    error = failure_of(tmp_path / "m.gguf", ggufs.build({"": 1}))
    assert (error.field, error.offset) == ("key 1 of 1", 24)


@pytest.mark.parametrize("kind", [13, 255, 2**32 - 1])
def test_unknown_kinds_of_value(tmp_path: Path, kind: int) -> None:
    head = ggufs.string("k")
    error = failure_of(tmp_path / "m.gguf", raw_entry(head + struct.pack("<IQ", kind, 0)))
    assert (error.field, error.offset) == ("key 'k'", 24 + len(head))
    array = head + struct.pack("<IIQ", 9, kind, 0)
    error = failure_of(tmp_path / "m.gguf", raw_entry(array))
    assert (error.field, error.offset) == ("key 'k'", 24 + len(head) + 4)


def test_nested_arrays(tmp_path: Path) -> None:
    depth = 5000
    raw = raw_entry(ggufs.string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth)
    assert "array of arrays" in str(failure_of(tmp_path / "m.gguf", raw))


@pytest.mark.parametrize("length", [20, 2**30, 2**30 + 1, 2**40, 2**63, 2**64 - 1])
def test_lengths_are_bounded_by_the_bytes_left(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.gguf"
    long_string = struct.pack("<Q", length) + b"x"
    key = ggufs.string("k")
    assert failure_of(path, raw_entry(long_string + bytes(5))).field == "key 1 of 1"
    assert failure_of(path, raw_entry(key + struct.pack("<I", 8) + long_string)).field == "key 'k'"
    for item in range(13):
        array = struct.pack("<IIQ", 9, item, length) + b"x"
        assert failure_of(path, raw_entry(key + array)).field == "key 'k'"
    strings = struct.pack("<IIQ", 9, 8, 2) + ggufs.string("ok") + long_string
    assert failure_of(path, raw_entry(key + strings + bytes(5))).field == "key 'k'"


@pytest.mark.parametrize("value", [0, 1, 3, 4, 24, 33, 2**32 - 1])
def test_alignment_is_a_power_of_two(tmp_path: Path, value: int) -> None:
    error = failure_of(tmp_path / "m.gguf", ggufs.build({"general.alignment": value}))
    assert (error.field, error.offset) == ("key 'general.alignment'", 24)
    assert "power of two" in str(error)


@pytest.mark.parametrize("value", [Typed("u16", 32), Typed("u64", 32), 32.0, True, "32", [32]])
def test_alignment_is_u32(tmp_path: Path, value: object) -> None:
    error = failure_of(tmp_path / "m.gguf", ggufs.build({"general.alignment": value}))
    assert error.field == "key 'general.alignment'"


def test_alignment_beyond_the_file(tmp_path: Path) -> None:
    raw = bytearray(ggufs.build({"general.alignment": 64}, [tensor("x", ramp(8))], alignment=64))
    at = raw.index(b"general.alignment") + len(b"general.alignment") + 4
    raw[at : at + 4] = struct.pack("<I", 2**31)
    error = failure_of(tmp_path / "m.gguf", bytes(raw))
    assert error.field == "tensor 'x'"
    assert "download incomplete?" in str(error)


# Damaged tensor descriptions


@pytest.mark.parametrize(
    ("spec", "field", "said"),
    [
        (TensorSpec("", 0, (1,), bytes(4)), "tensor 1 of 1", "name"),
        (TensorSpec("n" * 64, 0, (1,), bytes(4)), "tensor 1 of 1", "64 bytes"),
        (TensorSpec("é" * 32, 0, (1,), bytes(4)), "tensor 1 of 1", "64 bytes"),
        (TensorSpec("x", 0, (1, 1, 1, 1, 1), bytes(4)), "tensor 'x'", "5 dimensions"),
        (TensorSpec("x", 0, (2**63,), b""), "tensor 'x'", "impossibly large"),
        (TensorSpec("x", 0, (2**62, 2), b""), "tensor 'x'", "impossibly large"),
        (TensorSpec("x", 0, (2**32, 2**32, 1, 1), b""), "tensor 'x'", "impossibly large"),
        (TensorSpec("x", 0, (2**16, 2**16, 2**16, 2**15 - 1), b""), "tensor 'x'", "incomplete?"),
        (TensorSpec("x", 8, (33, 2), bytes(68)), "tensor 'x'", "multiple of 32, the block of Q8_0"),
        (TensorSpec("x", 12, (32, 8), bytes(144)), "tensor 'x'", "multiple of 256"),
        (TensorSpec("x", 43, (1,), bytes(4)), "tensor 'x'", "unknown type 43"),
        (TensorSpec("x", 2**32 - 1, (1,), bytes(4)), "tensor 'x'", "unknown type 4294967295"),
        (TensorSpec("x", 0, (1,), bytes(4), offset=32), "tensor 'x'", "gap"),
        (TensorSpec("x", 0, (1,), bytes(4), offset=1), "tensor 'x'", "expected"),
        (TensorSpec("x", 0, (1,), bytes(4), offset=2**64 - 32), "tensor 'x'", "expected"),
    ],
)
def test_bad_descriptions(tmp_path: Path, spec: TensorSpec, field: str, said: str) -> None:
    raw = ggufs.build({}, [spec])
    error = failure_of(tmp_path / "m.gguf", raw)
    assert error.field == field
    assert said in str(error)
    assert error.offset is not None
    assert 24 <= error.offset < len(raw)


@pytest.mark.parametrize(("kind", "name"), list(REMOVED.items()))
def test_removed_types_are_named(tmp_path: Path, kind: int, name: str) -> None:
    error = failure_of(tmp_path / "m.gguf", ggufs.build({}, [TensorSpec("x", kind, (32,), b"")]))
    assert name in str(error)


def test_names_of_63_bytes(tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "m.gguf", {}, [tensor("n" * 63, ramp(1))])
    assert list(GGUFFile.open(path).tensors) == ["n" * 63]


def test_names_are_unique(tmp_path: Path) -> None:
    raw = ggufs.build({}, [tensor("x", ramp(1)), tensor("y", ramp(1)), tensor("x", ramp(1))])
    error = failure_of(tmp_path / "m.gguf", raw)
    assert error.field == "tensor 'x'"
    assert "twice" in str(error)


@pytest.mark.parametrize("offset", [0, 32, 64 + 8, 96 + 32, 2**63])
def test_overlaps_and_gaps(tmp_path: Path, offset: int) -> None:
    second = TensorSpec("y", 0, (8,), bytes(32), offset=offset)
    error = failure_of(tmp_path / "m.gguf", ggufs.build({}, [tensor("x", ramp(20)), second]))
    assert (error.field, "96 is expected" in str(error)) == ("tensor 'y'", True)


def test_truncated_data_tells_both_sizes(tmp_path: Path) -> None:
    raw = ggufs.build({}, [tensor("x", ramp(8)), tensor("y", ramp(64)), tensor("z", ramp(64))])
    error = failure_of(tmp_path / "m.gguf", raw[:-300])
    assert error.field == "tensor 'y'"
    assert f"{len(raw) - 300} bytes of {len(raw)}" in str(error)
    assert "download incomplete?" in str(error)


def test_messages_are_one_printable_line(tmp_path: Path) -> None:
    key = "evil\n\x1b[2J" + "k" * 5000
    raw = raw_entry(ggufs.string(key.encode() + b"\xff") + struct.pack("<I", 99))
    message = str(failure_of(tmp_path / "m.gguf", raw))
    assert message.isprintable()
    assert len(message) < 400 + len(str(tmp_path))


# What the metadata mean


def vocabulary(**changes: Any) -> dict[str, Any]:
    keys = {
        "tokens": ["a", "b", "c"],
        "token_type": np.ones(3, np.int32),
        "scores": np.zeros(3, np.float32),
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**keys, **changes}.items()}


def test_sound_vocabulary(tmp_path: Path) -> None:
    GGUFFile.open(ggufs.write(tmp_path / "m.gguf", vocabulary(token_type=np.ones(4, np.int32))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", np.ones(3, np.int32)),
        ("merges", "a b"),
        ("token_type", np.ones(2, np.int32)),
        ("token_type", np.ones(3, np.float32)),
        ("token_type", 1),
        ("scores", np.zeros(2, np.float32)),
        ("scores", ["0", "0", "0"]),
        ("bos_token_id", 3),
        ("eos_token_id", -1),
        ("padding_token_id", 2**32 - 1),
        ("eot_token_id", "c"),
    ],
)
def test_unsound_vocabularies(tmp_path: Path, key: str, value: object) -> None:
    error = failure_of(tmp_path / "m.gguf", ggufs.build(vocabulary(**{key: value})))
    assert error.field == f"key 'tokenizer.ggml.{key}'"
    assert error.offset is not None


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"block_count": 512, "expert_count": 1024, "expert_used_count": 1024}, None),
        ({"expert_used_count": [2, 8]}, None),
        ({"block_count": 513}, "block_count"),
        ({"block_count": -1}, "block_count"),
        ({"block_count": 2.0}, "block_count"),
        ({"expert_count": 1025}, "expert_count"),
        ({"expert_used_count": 9}, "expert_used_count"),
        ({"expert_used_count": [2, 9]}, "expert_used_count"),
        ({"expert_used_count": "2"}, "expert_used_count"),
    ],
)
def test_layers_and_experts(tmp_path: Path, changes: dict[str, Any], wrong: str | None) -> None:
    keys = {"block_count": 2, "expert_count": 8, "expert_used_count": 2, **changes}
    metadata = {f"deepseek2.{key}": value for key, value in keys.items()}
    raw = ggufs.build({"general.architecture": "deepseek2", **metadata})
    if wrong is None:
        (tmp_path / "m.gguf").write_bytes(raw)
        GGUFFile.open(tmp_path / "m.gguf")
    else:
        assert failure_of(tmp_path / "m.gguf", raw).field == f"key 'deepseek2.{wrong}'"


# Split files

HEAD = {"general.architecture": "llama"}


@pytest.mark.parametrize("first", [[], [tensor("a", ramp(3))]])
def test_split_files_open_as_one(tmp_path: Path, first: list[TensorSpec]) -> None:
    shards = [first, [tensor("b", ramp(8)), tensor("c", ramp(2))], [tensor("d", -ramp(40))]]
    paths = ggufs.write_split(tmp_path, HEAD, shards)
    model = GGUFFile.open(paths[0])
    assert model.paths == paths
    assert model.file_bytes == sum(path.stat().st_size for path in paths)
    assert list(model.tensors) == [spec.name for shard in shards for spec in shard]
    assert model.tensors["d"].path == paths[2]
    for spec in shards[1]:
        assert model.tensors[str(spec.name)].data.tobytes() == spec.data


def test_split_files_of_the_reference_writer(tmp_path: Path) -> None:
    writer = reference.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    arrays = {f"t{i}": ramp(i + 1, 4) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GGUFFile.open(tmp_path / "m-00001-of-00003.gguf")
    assert model.architecture == "llama"
    for name, array in arrays.items():
        np.testing.assert_array_equal(model.tensors[name].data.view(np.float32), array.ravel())


def split_into_three(folder: Path) -> list[Path]:
    return ggufs.write_split(folder, HEAD, [[tensor(name, ramp(3))] for name in "abc"])


def test_another_part_names_the_first(tmp_path: Path) -> None:
    paths = split_into_three(tmp_path)
    error = failure(paths[1])
    assert f"open the first one, {paths[0]}" in str(error)
    assert "part 2 of 3" in str(error)


def test_missing_part_is_named(tmp_path: Path) -> None:
    paths = split_into_three(tmp_path)
    paths[2].unlink()
    assert f"its part {paths[2].name} is missing" in str(failure(paths[0]))
    paths[1].unlink()
    assert f"its part {paths[1].name} and 1 more is missing" in str(failure(paths[0]))


def test_renamed_first_part(tmp_path: Path) -> None:
    paths = split_into_three(tmp_path)
    renamed = paths[0].rename(tmp_path / "other.gguf")
    assert "PREFIX-00001-of-00003.gguf" in str(failure(renamed))
    renamed = renamed.rename(tmp_path / "model-00001-of-00002.gguf")
    assert "model-00001-of-00003.gguf" in str(failure(renamed))


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        (1, ("split.no", 1), 2, "is 2 where 1 is expected"),
        (2, ("split.count", 3), 4, "is 4 where 3 is expected"),
        (0, ("split.tensors.count", 3), 4, "is 4 but the 3 parts hold 3 tensors"),
    ],
)
def test_parts_must_agree(
    tmp_path: Path, part: int, old: tuple[str, int], new: int, said: str
) -> None:
    paths = split_into_three(tmp_path)
    raw = bytearray(paths[part].read_bytes())
    at = raw.index(old[0].encode()) + len(old[0]) + 4
    assert raw[at] == old[1]
    raw[at] = new
    paths[part].write_bytes(raw)
    error = failure(paths[0])
    assert said in str(error)
    assert error.field == f"key '{old[0]}'"


def test_names_are_unique_across_parts(tmp_path: Path) -> None:
    shards = [[tensor("a", ramp(3))], [tensor("a", ramp(3))]]
    error = failure(ggufs.write_split(tmp_path, HEAD, shards)[0])
    assert error.field == "tensor 'a'"
    assert "model-00001-of-00002.gguf too" in str(error)


def test_damage_in_another_part_names_that_part(tmp_path: Path) -> None:
    paths = split_into_three(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-30])
    assert str(failure(paths[0])).startswith(str(paths[1]))


# Search for damaged weights

# Types that the package decodes, but MXFP4, whose scale that is no number it takes for 2^128.
DEQUANTIZED = [
    *(GGMLType.BF16, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0),
    *(GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K),
    *(GGMLType.IQ1_S, GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ2_S, GGMLType.IQ3_XXS),
    *(GGMLType.IQ3_S, GGMLType.IQ4_NL, GGMLType.IQ4_XS, GGMLType.TQ1_0, GGMLType.TQ2_0),
]


@pytest.mark.parametrize("kind", DEQUANTIZED)
def test_search_agrees_with_the_reference_decoder(tmp_path: Path, kind: GGMLType) -> None:
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (4000, kind.block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        values = reference.dequantize(blocks, reference.GGMLQuantizationType(int(kind)))
    blocks_hit = ~np.isfinite(values).all(axis=1)
    assert blocks_hit.any()
    shape = (kind.block_elements, len(blocks))
    sound = blocks[~blocks_hit]
    specs = [
        tensor("bad", blocks, kind, shape),
        tensor("good", sound, kind, (kind.block_elements, len(sound))),
    ]
    found = find_nonfinite(GGUFFile.open(ggufs.write(tmp_path / "m.gguf", {}, specs)))
    assert [t.name for t, _ in found] == ["bad"]
    assert blocks_hit.sum() <= found[0][1] <= 2 * blocks_hit.sum()


def test_search_finds_mxfp4_scales_that_are_no_number(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 255, (4000, 17), np.uint8)
    blocks[[5, 3999], 0] = 255
    path = ggufs.write(tmp_path / "m.gguf", {}, [tensor("x", blocks, GGMLType.MXFP4, (32, 4000))])
    assert [count for _, count in find_nonfinite(GGUFFile.open(path))] == [2]


def test_search_counts_values_and_reports_progress(tmp_path: Path) -> None:
    values = np.zeros(3_000_000, np.float32)
    values[[0, 7, 1_500_000, -1]] = [np.nan, np.inf, -np.inf, np.nan]
    path = ggufs.write(tmp_path / "m.gguf", {}, [tensor("x", values), tensor("y", ramp(5))])
    calls: list[tuple[int, int]] = []
    opened = GGUFFile.open(path)
    found = find_nonfinite(opened, lambda done, total: calls.append((done, total)))
    assert found == [(opened.tensors["x"], 4)]
    assert calls[-1] == (values.nbytes + 20, values.nbytes + 20)
    assert len(calls) > 2
    assert calls == sorted(calls)

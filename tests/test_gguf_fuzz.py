"""Fuzzing of the GGUF reader: whatever the bytes, it opens the file or raises `GGUFError`."""

from __future__ import annotations

import multiprocessing
import os
import resource
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as reference
import ggufs
import numpy as np
import pytest
from ggufs import TensorSpec, Typed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localds.gguf import GGMLType, GGUFError, GGUFFile

SLACK_BYTES = 4 << 20
"""What opening a file may allocate beyond its size; the lengths tried are far above it."""

OPEN_SECONDS = 1.0
"""Longest that any small file may take; the usual is below a millisecond."""

relaxed = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def attempt(path: Path) -> GGUFFile | None:
    """Open and read everything; None where the file is refused, any other error is a failure."""
    start = time.perf_counter()
    try:
        model = GGUFFile.open(path)
        for key in model.metadata:
            assert model.metadata[key] is not None
        for found in model.tensors.values():
            assert 0 <= found.offset <= found.offset + found.nbytes <= model.file_bytes
            assert found.data.sum() >= 0
    except GGUFError as error:
        assert str(path) in str(error)
        assert str(error).isprintable()
        if path.stat().st_size:
            assert error.field
            assert error.offset is not None
            assert 0 <= error.offset <= path.stat().st_size
        model = None
    assert time.perf_counter() - start < OPEN_SECONDS
    return model


# Sound files, against the reference package in both directions

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
plain = {
    "u8": st.integers(0, 2**8 - 1),
    "i8": st.integers(-(2**7), 2**7 - 1),
    "u16": st.integers(0, 2**16 - 1),
    "i16": st.integers(-(2**15), 2**15 - 1),
    "u32": st.integers(0, 2**32 - 1),
    "i32": st.integers(-(2**31), 2**31 - 1),
    "u64": st.integers(0, 2**64 - 1),
    "i64": st.integers(-(2**63), 2**63 - 1),
    "f32": st.floats(width=32),
    "f64": st.floats(),
    "bool": st.booleans(),
    "string": text,
}


def typed(kind: str) -> st.SearchStrategy[Typed]:
    return st.builds(Typed, st.just(kind), plain[kind])


values = st.one_of(
    *(typed(kind) for kind in plain),
    *(st.lists(typed(kind), min_size=1, max_size=5) for kind in plain),
)
metadata_dicts = st.dictionaries(text.map(lambda name: "k." + name), values, max_size=8)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorSpec]:
    """Tensors of any type with data that differ from place to place."""
    names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=15)
    specs = []
    for name in draw(st.lists(names, unique=True, max_size=5)):
        # The package states another size than ggml for Q8_1, and does not know Q2_0.
        kinds = [kind for kind in GGMLType if kind.name not in ("Q8_1", "Q2_0")]
        kind = draw(st.sampled_from(kinds))
        dims = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        shape = (dims[0] * kind.block_elements, *dims[1:])
        size = int(np.prod(dims)) * kind.block_bytes
        data = np.random.default_rng(len(specs)).bytes(size)
        specs.append(TensorSpec(name, int(kind), shape, data))
    return specs


def same(ours: Any, expected: Any) -> bool:
    """Equality of values in which NaN equals NaN and arrays equal lists."""
    ours = ours.tolist() if isinstance(ours, np.ndarray) else ours
    expected = expected.tolist() if isinstance(expected, np.ndarray) else expected
    return repr(ours) == repr(expected)


def untyped(value: Any) -> Any:
    if isinstance(value, list):
        return [untyped(item) for item in value]
    return value.value


@relaxed
@given(
    metadata_dicts, tensor_lists(), st.sampled_from([2, 3]), st.sampled_from([8, 16, 32, 64, 256])
)
def test_sound_files_read_as_written_and_as_the_reference_reads_them(
    tmp_path: Path,
    metadata: dict[str, Any],
    specs: list[TensorSpec],
    version: int,
    alignment: int,
) -> None:
    path = tmp_path / "m.gguf"
    ggufs.write(path, metadata, specs, version=version, alignment=alignment)
    model = GGUFFile.open(path)
    oracle = reference.GGUFReader(path)
    assert set(model.metadata) - {"general.alignment"} == set(metadata)
    for key, value in metadata.items():
        assert same(model.metadata[key], untyped(value))
        assert same(model.metadata[key], oracle.fields[key].contents())
    assert [found.name for found in model.tensors.values()] == [t.name for t in oracle.tensors]
    for spec, expected in zip(specs, oracle.tensors, strict=True):
        found = model.tensors[str(spec.name)]
        assert found.data.tobytes() == spec.data == expected.data.tobytes()
        assert found.shape == spec.shape == tuple(int(n) for n in expected.shape)
        assert int(found.type) == spec.type == int(expected.tensor_type)
        assert found.offset == expected.data_offset


WRITER_KINDS = {
    "u8": "add_uint8",
    "i8": "add_int8",
    "u16": "add_uint16",
    "i16": "add_int16",
    "u32": "add_uint32",
    "i32": "add_int32",
    "u64": "add_uint64",
    "i64": "add_int64",
    "f32": "add_float32",
    "f64": "add_float64",
    "bool": "add_bool",
    "string": "add_string",
}


@relaxed
@given(
    st.dictionaries(
        text.map(lambda name: "k." + name),
        st.one_of(
            *(typed(kind) for kind in plain),
            st.lists(text, min_size=1, max_size=5),
            st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
        ),
        max_size=8,
    ),
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=9),
        st.lists(st.integers(1, 5), min_size=1, max_size=4),
        max_size=5,
    ),
    st.sampled_from([8, 32, 128]),
)
def test_files_of_the_reference_writer(
    tmp_path: Path, metadata: dict[str, Any], shapes: dict[str, list[int]], alignment: int
) -> None:
    path = tmp_path / "m.gguf"
    writer = reference.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        if isinstance(value, Typed):
            # add_string leaves out empty strings.
            getattr(writer, WRITER_KINDS[value.kind])(key, value.value or type(value.value)("0"))
        else:
            writer.add_array(key, value)
    arrays = {name: np.random.default_rng(0).normal(size=shape) for name, shape in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(name, array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = GGUFFile.open(path)
    assert model.architecture == "llama"
    for key, value in metadata.items():
        expected = value.value or type(value.value)("0") if isinstance(value, Typed) else value
        assert same(model.metadata[key], expected)
    assert set(model.tensors) == set(arrays)
    for name, array in arrays.items():
        assert model.tensors[name].shape == array.shape[::-1]
        assert model.tensors[name].data.tobytes() == array.astype(np.float16).tobytes()


# Damaged files


def write_small_model(path: Path) -> int:
    """A model of the reference writer with every part that a real one has; returns header bytes."""
    writer = reference.GGUFWriter(path, "deepseek2")
    writer.add_block_count(2)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_weights_norm(True)
    writer.add_feed_forward_length([4, 8])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "é", "<s>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_scores([0.0, -1.0, -2.0, 0.0])
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(3)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    blocks = np.zeros((2, 2, 34), np.uint8)
    writer.add_tensor("blk.0.ffn.weight", blocks, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(found.offset for found in GGUFFile.open(path).tensors.values())


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    write_small_model(path)
    return path.read_bytes()


LENGTHS = (0, 1, 8, 2**16, 2**30, 2**30 + 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def patches(raw: bytes, offset: int) -> Iterator[bytes]:
    """Replacements of the bytes at `offset`: flipped bits, and lengths of every magnitude."""
    byte = raw[offset]
    yield from (bytes([byte ^ 0x01]), bytes([byte ^ 0x80]), bytes([byte ^ 0xFF]))
    yield from (struct.pack("<Q", length) for length in LENGTHS)
    yield struct.pack("<Q", len(raw))
    yield struct.pack("<I", 2**32 - 1)


def sweep_offsets(path: Path) -> None:
    """Patch every offset of the header; runs in a process whose memory is limited."""
    header_bytes = write_small_model(path)
    raw = path.read_bytes()
    limit_memory(len(raw) + SLACK_BYTES)
    outcomes = {True: 0, False: 0}
    with path.open("r+b", buffering=0) as file:
        for offset in range(header_bytes):
            for patch in patches(raw, offset):
                patched = patch[: len(raw) - offset]
                file.seek(offset)
                file.write(patched)
                outcomes[attempt(path) is None] += 1
                file.seek(offset)
                file.write(raw[offset : offset + len(patched)])
    assert attempt(path) is not None
    assert min(outcomes.values()) > 100, outcomes


def sweep_lengths(path: Path) -> None:
    """Cut the file byte by byte; runs in a process whose memory is limited."""
    write_small_model(path)
    size = path.stat().st_size
    needed = max(t.offset + t.nbytes for t in GGUFFile.open(path).tensors.values())
    limit_memory(size + SLACK_BYTES)
    for length in reversed(range(size)):
        os.truncate(path, length)
        assert (attempt(path) is None) == (length < needed), length


def limit_memory(more: int) -> None:
    """Let this process map `more` bytes beyond what it has; only Linux tells and enforces it."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


@pytest.mark.parametrize("sweep", [sweep_offsets, sweep_lengths])
def test_sweeps_of_a_damaged_model_in_limited_memory(tmp_path: Path, sweep: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=sweep, args=(tmp_path / "m.gguf",)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


@relaxed
@given(data=st.data())
def test_any_mutation_of_a_model(tmp_path: Path, small_model: bytes, data: st.DataObject) -> None:
    raw = bytearray(small_model)
    chunks = st.one_of(
        st.binary(min_size=1, max_size=12),
        st.integers(0, 2**64 - 1).map(lambda number: struct.pack("<Q", number)),
    )
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(0, len(raw) - 1))
        chunk = data.draw(chunks)
        cut = data.draw(st.sampled_from([0, len(chunk), 1]))
        raw[offset : offset + cut] = chunk
    check_bounded(tmp_path / "m.gguf", bytes(raw))


@relaxed
@given(st.binary(max_size=400), st.integers(0, 3), st.integers(0, 3))
def test_any_bytes_after_a_sound_start(
    tmp_path: Path, rest: bytes, n_tensors: int, n_entries: int
) -> None:
    head = ggufs.build(n_tensors=n_tensors, n_entries=n_entries)
    check_bounded(tmp_path / "m.gguf", head + rest)


@relaxed
@given(
    st.lists(
        st.builds(
            TensorSpec,
            st.binary(max_size=70),
            st.integers(0, 50),
            st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 512), max_size=6).map(tuple),
            st.binary(max_size=64),
            st.none() | st.integers(0, 2**64 - 1),
        ),
        max_size=4,
    ),
    metadata_dicts,
)
def test_any_description_of_tensors(
    tmp_path: Path, specs: list[TensorSpec], metadata: dict[str, Any]
) -> None:
    check_bounded(tmp_path / "m.gguf", ggufs.build(metadata, specs))


def check_bounded(path: Path, raw: bytes) -> None:
    """`attempt` a file, and check that it takes no memory beyond the file's size and the slack."""
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        attempt(path)
        assert tracemalloc.get_traced_memory()[1] < len(raw) + SLACK_BYTES
    finally:
        tracemalloc.stop()


HUGE = 6 << 30
"""A sparse file of this size takes no room on the disk, and bounds by the bytes left allow much."""


def value_of(item: int, count: int) -> bytes:
    """An array of `count` items, whose bytes are the zeros that follow."""
    return struct.pack("<IIQ", 9, item, count)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (value_of(0, 2**30), "key 2 of 2"),
        (value_of(4, 2**30), "key 2 of 2"),
        (value_of(0, 2**30 + 1), "key 'k'"),
        (value_of(10, 2**29), "key 2 of 2"),
        (value_of(8, 2**24 + 1), "key 'k'"),
        (value_of(8, 2**29), "key 'k'"),
        (value_of(8, 2) + struct.pack("<Q", 2**30 + 1), "key 'k'"),
        (struct.pack("<IQ", 8, 2**30 + 1), "key 'k'"),
    ],
)
def test_huge_lengths_in_a_huge_file(tmp_path: Path, value: bytes, field: str) -> None:
    """The value either ends before the second key, which is empty, or is refused itself."""
    path = tmp_path / "m.gguf"
    path.write_bytes(ggufs.build(n_entries=2) + ggufs.string("k") + value)
    with path.open("r+b") as file:
        file.truncate(HUGE)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(path)
    assert time.perf_counter() - start < OPEN_SECONDS
    assert tracemalloc.get_traced_memory()[1] < SLACK_BYTES
    tracemalloc.stop()
    assert caught.value.field == field

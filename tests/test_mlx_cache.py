"""The cache in device memory: its bytes, its mirror in the process, and what is kept of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import gguf.quants
import numpy as np
import pytest

from localds.gguf import GGMLType
from localds.memory.kept_rows import KeptRows
from localds.memory.latents import CACHE_TYPES, ContextError, LatentCache
from localds.memory.row_blocks import BLOCK

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.ops.mlx import cache as module  # noqa: E402
from localds.ops.mlx.cache import DeviceCache, DeviceRows, decoded, encoded  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]

LAYERS, WIDTH, CAPACITY = 3, 64, 400
NAMES = pytest.mark.parametrize("name", CACHE_TYPES)
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def new_cache(name: str = "q8_0", capacity: int = CAPACITY) -> DeviceCache:
    return DeviceCache(LAYERS, WIDTH, capacity, name, mx.new_thread_unsafe_stream(mx.cpu))


def compute(cache: DeviceCache, n: int) -> list[Bytes]:
    """Have `n` rows of random values computed, as a decoder does; returns each layer's bytes."""
    cache.reserve(n)
    cache.upload()
    written = []
    with mx.stream(cache._stream):
        for rows in cache.device:
            values = RNG.standard_normal((n, WIDTH)).astype(np.float32)
            rows.write(mx.array(values), cache.length)
            written.append(as_kept(values, rows.type))
    cache.extend_computed(n)
    return written


def fill(cache: LatentCache, n: int) -> list[Bytes]:
    """Write `n` rows of any bits, as a reader of kept rows does; returns each layer's bytes."""
    written = []
    for rows in cache.rows(cache.length, cache.length + n):
        rows[:] = RNG.bytes(len(rows))
        written.append(np.array(rows).reshape(n, cache.row_bytes))
    cache.extend(n)
    return written


def as_kept(values: Floats, kind: GGMLType) -> Bytes:
    """By gguf's own quantizers, uint8 [n, row bytes]."""
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
    return blocks.view(np.uint8).reshape(len(values), -1)


def on_host(cache: LatentCache, start: int, stop: int) -> list[Bytes]:
    return [np.array(rows).reshape(-1, cache.row_bytes) for rows in cache.rows(start, stop)]


def on_device(cache: DeviceCache) -> list[Bytes]:
    return [np.array(rows.rows[: cache.length]).view(np.uint8) for rows in cache.device]


def same(actual: list[Bytes], expected: list[Bytes]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(actual, expected, strict=True))


# ---- q8_0 ----


def halves() -> Floats:
    """Every half step of a scale, both signs, in blocks that hold its largest value."""
    steps = np.concatenate([np.arange(254) / 2, -np.arange(254) / 2])
    blocks = np.full((17, 32), 127.0)
    blocks[:, 1:31] = np.pad(steps, (0, 2)).reshape(17, 30)
    scaled: Floats = np.concatenate([blocks, blocks * 0.125, blocks * 3]).astype(np.float32)
    return scaled


VALUES: dict[str, Callable[[], Any]] = {
    "normal": lambda: RNG.standard_normal((4000, 96)),
    "of many sizes": lambda: RNG.standard_normal((4000, 96)) * 2.0 ** RNG.integers(-24, 18, 96),
    "uneven": lambda: RNG.standard_normal((4000, 96)) * np.exp(RNG.standard_normal((4000, 96)) * 3),
    "half steps": halves,
    "nothing": lambda: np.zeros((2, 96)),
    "little": lambda: RNG.standard_normal((50, 96)) * 1e-30,
}


@pytest.mark.parametrize("values", VALUES)
def test_blocks_are_those_of_ggml(values: str) -> None:
    rows = VALUES[values]().astype(np.float32)
    blocks = encoded(mx.array(rows), GGMLType.Q8_0)
    assert blocks.dtype == mx.uint8
    expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(np.array(blocks), expected)
    assert np.array_equal(np.array(encoded(blocks, GGMLType.Q8_0)), expected)


def test_blocks_are_read_exactly() -> None:
    rows = RNG.standard_normal((200, 96)).astype(np.float32)
    blocks = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    exact = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(np.array(decoded(mx.array(blocks), mx.float32)), exact)
    halved = np.array(decoded(mx.array(blocks), mx.float16))
    assert np.array_equal(halved, exact.astype(np.float16))


# ---- one layer's rows ----


def rows_of(name: str, capacity: int) -> DeviceRows:
    return module.make_rows(LatentCache(1, WIDTH, capacity, name).layers[0], capacity)


@NAMES
def test_rows_grow_by_steps_up_to_the_capacity(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP", 16)
    rows = rows_of(name, 40)
    values = RNG.standard_normal((40, WIDTH)).astype(np.float32)
    expected = as_kept(values, CACHE_TYPES[name])
    sizes = []
    for start in range(40):
        rows.reserve(start + 1)
        seen = rows.write(mx.array(values[start : start + 1]), start)
        assert np.array_equal(np.array(seen).view(np.uint8), expected[: start + 1])
        sizes.append(len(rows.rows))
    assert sizes == [16] * 16 + [32] * 16 + [40] * 8
    with pytest.raises(ValueError, match="reserve 41 rows: the capacity is 40"):
        rows.reserve(41)


def test_rows_are_written_at_a_place_that_the_graph_does_not_know() -> None:
    rows = rows_of("f32", 30)
    rows.reserve(20)
    seen = rows.write(mx.ones((2, WIDTH)), mx.array([7], mx.int32))
    assert seen.shape == (30, WIDTH)
    assert np.array_equal(np.array(seen).any(axis=1), np.isin(np.arange(30), [7, 8]))


def test_growing_doubles_one_layer_at_a_time() -> None:
    cache = DeviceCache(8, 512, 4096, "f32", mx.default_stream(mx.cpu))
    cache.reserve(1000)
    layer = cache.device[0].rows.nbytes
    assert layer == 1024 * 512 * 4
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cache.reserve(2000)
    grown = mx.get_active_memory() - before
    assert grown == 8 * layer
    # The rows to add, and the layer that grows last while it is there twice.
    assert mx.get_peak_memory() - before - grown <= 2 * layer + 64
    assert mx.get_cache_memory() < layer


def test_writing_a_token_copies_nothing() -> None:
    cache = new_cache("f16", capacity=1 << 15)
    cache.reserve(1 << 15)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(5):
        compute(cache, 1)
        mx.eval([rows.rows for rows in cache.device])
    assert mx.get_peak_memory() - before < cache.device[0].rows.nbytes / 10


# ---- the mirror ----


@NAMES
def test_computed_rows_are_read_on_the_host(name: str) -> None:
    cache = new_cache(name)
    first, second = compute(cache, 37), compute(cache, 1)
    whole = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    assert same(on_host(cache, 10, 38), [rows[10:] for rows in whole])
    assert same(on_host(cache, 0, 38), whole)


@NAMES
def test_written_rows_reach_the_device(name: str) -> None:
    """Of any bits, also between rows that are computed."""
    cache = new_cache(name)
    parts = [fill(cache, 5), compute(cache, 3), fill(cache, 33), fill(cache, 1)]
    cache.upload()
    whole = [np.concatenate(layer) for layer in zip(*parts, strict=True)]
    assert same(on_device(cache), whole)
    assert same(on_host(cache, 0, cache.length), whole)


def test_nothing_is_copied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache()
    fill(cache, 8)
    cache.upload()
    compute(cache, 4)
    cache.rows(0, 12)
    copies = []
    monkeypatch.setattr(mx, "take", lambda *_args, **_: copies.append("down"))
    monkeypatch.setattr(mx, "slice_update", lambda *_args, **_: copies.append("up"))
    cache.upload()
    cache.rows(0, 12)
    cache.rows(12, 40)
    assert not copies


def test_computing_before_the_upload_is_refused() -> None:
    cache = new_cache()
    fill(cache, 8)
    with pytest.raises(RuntimeError, match="8 rows were not uploaded"):
        cache.extend_computed(1)
    assert cache.length == 8


def test_more_than_the_capacity_is_refused() -> None:
    cache = new_cache()
    compute(cache, CAPACITY - 1)
    with pytest.raises(ContextError, match="401 tokens do not fit in the context of 400"):
        cache.reserve(2)
    cache.reserve(1)


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_uses(seed: int) -> None:
    """Whatever is computed, written, read, forgotten and restored: both sides hold the same."""
    random = np.random.default_rng(seed)
    cache = new_cache(list(CACHE_TYPES)[seed % 3])
    expected = [np.zeros((0, cache.row_bytes), np.uint8)] * LAYERS
    for _ in range(60):
        n = int(random.integers(1, 20))
        use = random.integers(6)
        if use < 2 and cache.length + n <= CAPACITY:
            added = (compute, fill)[use](cache, n)
            expected = [np.concatenate(pair) for pair in zip(expected, added, strict=True)]
        elif use == 2:
            length = int(random.integers(cache.length // 2, cache.length + 1))
            cache.truncate(length)
            expected = [rows[:length] for rows in expected]
        elif use == 3:
            start, stop = sorted(random.integers(0, cache.length + 1, 2).tolist())
            assert same(on_host(cache, start, stop), [rows[start:stop] for rows in expected])
        elif use == 4:
            cache.upload()
            assert same(on_device(cache), expected)
        elif cache.length + n <= CAPACITY:
            # A reader that fails: what it wrote does not count.
            for rows in cache.rows(cache.length, cache.length + n):
                rows[:] = bytes(len(rows))
    assert same(on_host(cache, 0, cache.length), expected)
    cache.upload()
    assert same(on_device(cache), expected)


def test_many_threads_read() -> None:
    """All find what was computed in this thread, whoever copies it."""
    with ThreadPoolExecutor(4) as readers:
        for _ in range(10):
            cache = new_cache()
            written = compute(cache, 200)
            reads = [readers.submit(on_host, cache, start, 200) for start in range(0, 200, 10)]
            for start, read in zip(range(0, 200, 10), reads, strict=True):
                assert same(read.result(), [rows[start:] for rows in written])


def test_another_thread_goes_on() -> None:
    cache = new_cache()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        first = one.submit(compute, cache, 9).result()
        second = other.submit(fill, cache, 9).result()
        third = one.submit(compute, cache, 9).result()
        whole = [np.concatenate(parts) for parts in zip(first, second, third, strict=True)]
        assert same(other.submit(on_host, cache, 0, 27).result(), whole)
        assert same(on_device(cache), whole)


# ---- kept rows ----


@pytest.fixture
def kept(tmp_path: Path) -> KeptRows:
    return KeptRows(tmp_path / "latents", "a" * 64, 1 << 30)


IDS = list(range(5 * BLOCK + 7))


@NAMES
def test_computed_rows_are_kept_and_restored(kept: KeptRows, name: str) -> None:
    cache = new_cache(name)
    written = compute(cache, len(IDS))
    assert kept.keep(cache, IDS) > len(IDS) * LAYERS * cache.row_bytes
    other = new_cache(name)
    assert kept.restore(other, IDS) == len(IDS)
    assert same(on_host(other, 0, len(IDS)), written)
    other.upload()
    assert same(on_device(other), written)


def test_restored_after_going_back(kept: KeptRows) -> None:
    """Rows in the cache stay, also within a block; the rest comes from disk, then more goes on."""
    cache = new_cache()
    written = compute(cache, len(IDS))
    kept.keep(cache, IDS)
    cache.truncate(BLOCK + 9)
    assert kept.restore(cache, IDS) == len(IDS) - BLOCK - 9
    added = compute(cache, 3)
    whole = [np.concatenate(pair) for pair in zip(written, added, strict=True)]
    assert same(on_device(cache), whole)
    longer = [*IDS, 1, 2, 3]
    kept.keep(cache, longer)
    other = new_cache()
    compute(other, BLOCK - 1)
    other.truncate(0)
    assert kept.restore(other, longer) == len(longer)
    assert same(on_host(other, 0, len(longer)), whole)


def test_a_damaged_block_ends_what_is_restored(kept: KeptRows) -> None:
    cache = new_cache()
    written = compute(cache, len(IDS))
    kept.keep(cache, IDS)
    third = list(kept._blocks(cache, IDS))[2].path
    content = bytearray(third.read_bytes())
    content[100] ^= 1
    third.write_bytes(content)
    other = new_cache()
    assert kept.restore(other, IDS) == 2 * BLOCK
    added = compute(other, 1)
    expected = [np.concatenate([a[: 2 * BLOCK], b]) for a, b in zip(written, added, strict=True)]
    assert same(on_device(other), expected)


@NAMES
def test_each_device_restores_its_own(kept: KeptRows, name: str) -> None:
    """The CPU computes other low bits; what is kept of both lies side by side."""
    on_gpu, on_cpu = new_cache(name), LatentCache(LAYERS, WIDTH, CAPACITY, name)
    assert on_gpu.layout == f"{on_cpu.layout} gpu"
    computed, filled = compute(on_gpu, len(IDS)), fill(on_cpu, len(IDS))
    kept.keep(on_gpu, IDS)
    assert kept.restore(LatentCache(LAYERS, WIDTH, CAPACITY, name), IDS) == 0
    kept.keep(on_cpu, IDS)
    for other, rows in (
        (new_cache(name), computed),
        (LatentCache(LAYERS, WIDTH, CAPACITY, name), filled),
    ):
        assert kept.restore(other, IDS) == len(IDS)
        assert same(on_host(other, 0, len(IDS)), rows)

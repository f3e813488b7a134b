"""The latent cache's bookkeeping, and sizes as text."""

import pytest

from localds.gguf import GGMLType
from localds.memory.latents import ContextError, LatentCache, row_bytes
from localds.units import format_size, parse_size


def test_row_bytes_of_a_v2_lite_row() -> None:
    assert row_bytes("f16", 576) == 1152
    assert row_bytes("q8_0", 576) == 612
    assert row_bytes("f32", 576) == 2304


@pytest.mark.parametrize(("cache_type", "width"), [("q4_0", 576), ("q8_0", 40), ("", 576)])
def test_row_bytes_rejects_what_no_cache_can_hold(cache_type: str, width: int) -> None:
    with pytest.raises(ValueError, match="cache"):
        row_bytes(cache_type, width)


def test_cache_counts_rows_and_refuses_more_than_it_holds() -> None:
    cache = LatentCache(2, 64, 10, "q8_0")
    assert [layer.type for layer in cache.layers] == [GGMLType.Q8_0] * 2
    assert cache.layers[0].data.shape == (10, 68)
    cache.reserve(10)
    cache.extend(7)
    with pytest.raises(ContextError, match="11 tokens do not fit in the context of 10"):
        cache.reserve(4)
    cache.truncate(3)
    cache.reserve(7)
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(4)


def test_cache_layers_do_not_share_rows() -> None:
    cache = LatentCache(2, 32, 4, "f32")
    cache.layers[0].data[:] = 1
    cache.layers[1].data[:] = 2
    assert (cache.layers[0].data == 1).all()


def test_a_huge_context_takes_no_memory_before_it_is_used() -> None:
    cache = LatentCache(27, 576, 163840)
    assert cache.layers[26].data.shape == (163840, 1152)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GiB", 5 * 2**30),
        ("800M", 800_000_000),
        ("1.5 GB", 1_500_000_000),
        ("123456", 123456),
        ("12kib", 12288),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "5 apples", "-1GiB", "1e9"])
def test_parse_size_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        parse_size(text)


def test_format_size() -> None:
    assert format_size(10.4 * 2**30) == "10.4 GiB"
    assert format_size(512) == "512 B"

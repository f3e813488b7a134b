"""Attention over rows in device memory: against float64, in one piece and in many."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import gguf.quants
import layer_oracle as oracle
import numpy as np
import pytest
from layer_cases import (
    BLOCK_MLA,
    GQA,
    gqa_layer_weights,
    hidden_states,
    mla_tensors,
    mla_weights,
    rng,
    tensor,
)

from localds.gguf import GGMLType
from localds.memory import latents
from localds.memory.latents import (
    CACHE_TYPES,
    LatentCache,
    attention_blocks,
    attention_scratch,
)
from localds.ops import GqaWeights

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.ops.mlx.attend import attend, attend_grouped  # noqa: E402
from localds.ops.mlx.cache import encoded, make_rows  # noqa: E402
from localds.ops.mlx.ops import MlxOps  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

HEADS, WIDTH, VALUE, GROUPS = 4, 96, 64, 2
LENGTH = 700

# Products of one token are in float32, those of long prompts in float16 but for rows in float32.
EXACT, ROUNDED = 5e-6, 4e-3


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that divide queries, and rows that are converted; not below eight queries."""
    monkeypatch.setattr(latents, "SCORE_BYTES", HEADS * 8 * LENGTH * 4)
    monkeypatch.setattr(latents, "SPAN_BYTES", WIDTH * 4 * 150)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that also divide rows that are taken as they are."""
    monkeypatch.setattr(latents, "SCORE_BYTES", HEADS * 8 * 101 * 4)


def kept_rows(kind: GGMLType, length: int, width: int = WIDTH) -> tuple[Any, Doubles]:
    """Rows as kept, and the values that they stand for."""
    values = rng(1).standard_normal((length, width)).astype(np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
    exact = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    return mx.array(blocks), exact.astype(np.float64)


def queries(n: int, width: int) -> Any:
    return mx.array((rng(2).standard_normal((HEADS, n, width)) / 4).astype(np.float32))


def expected(q: Any, keys: Doubles, values: Doubles, past: int) -> Doubles:
    """Of keys and values [heads, length, width], in float64."""
    n = q.shape[1]
    scores = np.array(q, np.float64) @ keys.swapaxes(1, 2)
    unseen = np.arange(keys.shape[1]) > past + np.arange(n)[:, None]
    return oracle.softmax(np.where(unseen, -np.inf, scores)) @ values


def shared(rows: Doubles) -> tuple[Doubles, Doubles]:
    return rows[None], rows[None, :, :VALUE]


def grouped(rows: Doubles) -> tuple[Doubles, Doubles]:
    both = rows.reshape(len(rows), 2, GROUPS, -1).repeat(HEADS // GROUPS, 2)
    return both[:, 0].swapaxes(0, 1), both[:, 1].swapaxes(0, 1)


def error(actual: Any, exact: Doubles) -> float:
    assert actual.dtype == mx.float32
    assert actual.shape == exact.shape
    return float(np.abs(np.array(actual) - exact).max() / np.abs(exact).max())


KINDS = pytest.mark.parametrize("kind", CACHE_TYPES.values(), ids=CACHE_TYPES)
LENGTHS = pytest.mark.parametrize("n", [1, 7, 300])
LIMITS = pytest.mark.parametrize("limits", ["", "small", "tiny"])


@KINDS
@LENGTHS
@LIMITS
def test_rows_that_all_heads_share(
    kind: GGMLType, n: int, limits: str, request: pytest.FixtureRequest
) -> None:
    if limits:
        request.getfixturevalue(limits)
    rows, exact = kept_rows(kind, LENGTH)
    q = queries(n, WIDTH)
    bound = EXACT if n == 1 or kind is GGMLType.F32 else ROUNDED
    context = attend(q, rows, LENGTH - n, VALUE)
    assert error(context, expected(q, *shared(exact), LENGTH - n)) < bound


@KINDS
@LENGTHS
@LIMITS
def test_rows_of_groups(
    kind: GGMLType, n: int, limits: str, request: pytest.FixtureRequest
) -> None:
    if limits:
        request.getfixturevalue(limits)
    rows, exact = kept_rows(kind, LENGTH)
    q = queries(n, WIDTH // 2 // GROUPS)
    halves = kind is GGMLType.F16 or (kind is GGMLType.Q8_0 and n > 1)
    context = attend_grouped(q, rows, LENGTH - n, GROUPS)
    bound = ROUNDED if halves else EXACT
    assert error(context, expected(q, *grouped(exact), LENGTH - n)) < bound


@KINDS
@pytest.mark.parametrize("past", [0, 1, 149, 150, 303])
@pytest.mark.parametrize("limits", ["", "small"])
def test_a_graph_for_any_position(
    kind: GGMLType,
    past: int,
    limits: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """What lies in the rows after the token does not matter, and nothing is evaluated."""
    if limits:
        request.getfixturevalue(limits)
        assert attention_blocks(HEADS, 1, LENGTH, WIDTH, 4, converted=True)[1] == 150
    rows, exact = kept_rows(kind, LENGTH)
    at = mx.array([past], mx.int32)
    seen = exact[: past + 1]
    q, q_grouped = queries(1, WIDTH), queries(1, WIDTH // 2 // GROUPS)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", None)
        context = attend(q, rows, at, VALUE)
        of_groups = attend_grouped(q_grouped, rows, at, GROUPS)
    assert error(context, expected(q, *shared(seen), past)) < EXACT
    bound = ROUNDED if kind is GGMLType.F16 else EXACT
    assert error(of_groups, expected(q_grouped, *grouped(seen), past)) < bound


@pytest.mark.parametrize("limits", ["small", "tiny"])
def test_blocks_change_little(limits: str, request: pytest.FixtureRequest) -> None:
    rows, _ = kept_rows(GGMLType.F32, LENGTH)
    q, q_grouped = queries(300, WIDTH), queries(300, WIDTH // 2 // GROUPS)
    whole = attend(q, rows, 400, VALUE), attend_grouped(q_grouped, rows, 400, GROUPS)
    mx.eval(whole)
    request.getfixturevalue(limits)
    divided = attend(q, rows, 400, VALUE), attend_grouped(q_grouped, rows, 400, GROUPS)
    for one, other in zip(whole, divided, strict=True):
        assert float(mx.abs(one - other).max()) < 1e-5


@pytest.mark.usefixtures("tiny")
def test_each_part_of_a_long_prompt_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would begin many of them otherwise."""
    rows, _ = kept_rows(GGMLType.F32, 500)
    waits: list[Any] = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: waits.append(arrays))
    attend(queries(64, WIDTH), rows, 436, VALUE)
    assert attention_blocks(HEADS, 64, 500, WIDTH, 4, converted=False) == (8, 101)
    # Eight blocks; five spans of what each sees, and once for them all.
    assert len(waits) == 8 * (5 + 1)


@pytest.mark.usefixtures("tiny")
def test_scores_that_are_large() -> None:
    """Where one key outweighs all others by far, spans without it count for nothing."""
    rows = np.zeros((500, WIDTH), np.float32)
    rows[:, 0] = np.arange(500) * -1.0
    rows[:, 1] = np.arange(500)
    q = np.zeros((HEADS, 2, WIDTH), np.float32)
    q[:, :, 0] = [[60.0], [60.0], [-60.0], [-60.0]]
    context = np.array(attend(mx.array(q), mx.array(rows), 498, VALUE))
    assert (context[:2, :, 1] < 500 * np.exp(-60) * 1.001).all()
    assert (context[2:, :, 1] == [498, 499]).all()


# ---- sizes ----


@pytest.mark.parametrize("heads", [1, 16, 128])
@pytest.mark.parametrize("n", [1, 5, 8, 512])
@pytest.mark.parametrize("length", [512, 8000, 163840])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("converted", [False, True])
def test_limits_are_kept(heads: int, n: int, length: int, itemsize: int, converted: bool) -> None:
    count, keys = attention_blocks(heads, n, length, 576, itemsize, converted=converted)
    assert 1 <= count <= n
    assert 1 <= keys <= length
    assert count == n or (count >= 8 and count % 8 == 0)
    assert heads * count * keys * itemsize <= latents.SCORE_BYTES
    assert not converted or keys * 576 * itemsize <= latents.SPAN_BYTES
    # As much at a time as the limits allow.
    assert count == n or heads * (count + 8) * keys * itemsize > latents.SCORE_BYTES
    assert keys == length or (
        heads * min(n, 8) * (keys + 1) * itemsize > latents.SCORE_BYTES
        or (keys + 1) * 576 * itemsize > latents.SPAN_BYTES
    )


def test_a_large_model_attends_in_a_gigabyte() -> None:
    """DeepSeek-V3 with 128 heads, whose scores of a chunk would take 21 GB."""
    assert attention_scratch(128, 576, 512, 163840, "f16") < 1.1e9
    assert attention_scratch(128, 576, 1, 163840, "f16") < 0.5e9


@pytest.mark.parametrize("name", CACHE_TYPES)
@pytest.mark.parametrize(("heads", "n"), [(16, 256), (4, 512)])
def test_scratch_of_a_chunk(name: str, heads: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX says that it took, within a factor of two, and never more."""
    monkeypatch.setattr(latents, "SCORE_BYTES", 4 << 20)
    monkeypatch.setattr(latents, "SPAN_BYTES", 1 << 20)
    rows = encoded(mx.random.normal((4000, WIDTH)), CACHE_TYPES[name])
    mx.eval(rows)

    def attended() -> Any:
        return attend(mx.random.normal((heads, n, WIDTH)), rows, 4000 - n, VALUE)

    limit = attention_scratch(heads, WIDTH, n, 4000, name)
    assert limit / 2 < taken(attended) < limit


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_scratch_of_a_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are never converted as a whole, also where nothing is evaluated in between."""
    monkeypatch.setattr(latents, "SPAN_BYTES", 1 << 20)
    rows = encoded(mx.random.normal((60000, WIDTH)), CACHE_TYPES[name])
    q, at = mx.random.normal((HEADS, 1, WIDTH)), mx.array([50000], mx.int32)
    mx.eval(rows, q, at)
    limit = attention_scratch(HEADS, WIDTH, 1, 60000, name)
    assert name == "f32" or limit < 60000 * WIDTH * 4 / 2
    assert taken(lambda: attend(q, rows, at, VALUE)) < limit


def taken(compute: Callable[[], Any]) -> int:
    """Bytes that MLX had at most at a time beyond what it had before."""
    mx.synchronize()
    before: int = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute())
    peak: int = mx.get_peak_memory()
    return peak - before


# ---- layers ----


def mla_layer() -> tuple[Any, int, Callable[[Doubles], Doubles], Callable[..., Doubles]]:
    """A layer, the width of its rows, and in float64 the rows, and the layer on given ones."""
    w = mla_weights(BLOCK_MLA)
    layer = MlxOps().mla(mla_tensors(w, BLOCK_MLA, legacy=False), BLOCK_MLA)
    return (
        layer,
        BLOCK_MLA.kv_rank + BLOCK_MLA.rope_width,
        lambda x: oracle.mla_rows(x, w, BLOCK_MLA),
        lambda x, rows: oracle.mla(x, w, BLOCK_MLA, rows),
    )


def gqa_layer() -> tuple[Any, int, Callable[[Doubles], Doubles], Callable[..., Doubles]]:
    w = gqa_layer_weights()
    layer = MlxOps().gqa(GqaWeights(**{name: tensor(v, name) for name, v in w.items()}), GQA)
    return (
        layer,
        2 * GQA.kv_heads * GQA.head,
        lambda x: oracle.gqa_rows(x, w, GQA),
        lambda x, rows: oracle.gqa(x, w, GQA, rows),
    )


@pytest.mark.parametrize("name", CACHE_TYPES)
@pytest.mark.parametrize("make", [mla_layer, gqa_layer])
@LIMITS
def test_layers(
    name: str, make: Callable[[], Any], limits: str, request: pytest.FixtureRequest
) -> None:
    """A long piece, a short one, then single tokens, as float64 computes with the rows kept."""
    if limits:
        request.getfixturevalue(limits)
    layer, width, rows_of, attended = make()
    cache = make_rows(LatentCache(1, width, 64, name).layers[0], 64)
    x = hidden_states(rng(), 64)
    parts = [
        layer(mx.array(x[start:stop]), cache, start)
        for start, stop in pairwise([0, 50, 60, 61, 62, 63, 64])
    ]
    exact = x.astype(np.float64)
    kept = gguf.quants.dequantize(np.array(cache.rows), gguf.GGMLQuantizationType(cache.type))
    rows = rows_of(exact)
    assert np.abs(kept - rows).max() < STEPS[name] * np.abs(rows).max()
    added = attended(exact, kept.astype(np.float64)) - exact
    bound = 2e-5 if name == "f32" else ROUNDED
    assert error(mx.concatenate(parts) - mx.array(x), added) < bound


# A little more than half a step of the largest value of a row.
STEPS = {"f32": 2e-6, "f16": 2**-11, "q8_0": 0.51 / 127}

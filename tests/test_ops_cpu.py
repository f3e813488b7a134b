"""The fused CPU operations against layers written in numpy float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf.quants
import layer_oracle as oracle
import numpy as np
import pytest
from layer_cases import (
    BLOCK_MLA,
    EPS,
    GQA,
    HIDDEN,
    MLA,
    OPS,
    floats,
    hidden_states,
    make_gqa,
    make_mla,
    matrix,
    mla_tensors,
    mla_weights,
    moe_tensors,
    moe_weights,
    new_cache,
    norm_weight,
    rng,
    tensor,
)

from localds import _native
from localds.gguf import GGMLType, Tensor
from localds.ops import (
    FfnWeights,
    Gating,
    GroupScore,
    MlaShape,
    MlaWeights,
    Router,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from localds.memory.latents import LayerCache
    from localds.ops import Attention

    Floats = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = _native.threads()
    _native.set_threads(2)
    yield
    _native.set_threads(before)


def assert_near(actual: Any, expected: Any, bound: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


# ---- attention ----


def run(layer: Attention[Floats], x: Floats, cache: LayerCache, steps: list[int]) -> Floats:
    """Feed x in pieces of the given sizes."""
    assert sum(steps) == len(x)
    pieces, past = [], 0
    for n in steps:
        pieces.append(layer(x[past : past + n].copy(), cache, past))
        past += n
    return np.concatenate(pieces)


STEPS = {
    "at once": [70],
    "chunks": [33, 1, 36],
    "token by token": [1] * 70,
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("q_rank", [0, 40])
@pytest.mark.parametrize("legacy", [False, True])
def test_mla(legacy: bool, q_rank: int, steps: list[int]) -> None:
    layer, w = make_mla(legacy=legacy, q_rank=q_rank)
    x = hidden_states(rng(), 70)
    cache = new_cache("mla", 72)
    assert_near(run(layer, x, cache, steps), oracle.mla(x.astype(np.float64), w, MLA))
    assert_near(floats(cache, 70), oracle.mla_rows(x.astype(np.float64), w, MLA))
    assert (cache.data[70:] == 0xAB).all()


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_gqa(steps: list[int]) -> None:
    layer, w = make_gqa()
    x = hidden_states(rng(), 70)
    cache = new_cache("gqa", 72)
    assert_near(run(layer, x, cache, steps), oracle.gqa(x.astype(np.float64), w, GQA))
    assert_near(floats(cache, 70), oracle.gqa_rows(x.astype(np.float64), w, GQA))
    assert (cache.data[70:] == 0xAB).all()


# A rounded row is off by half a unit of its type, a Q8_0 one also by its scale's float16; what is
# computed from the row, only by float32.
ROUNDING = {"f16": 2**-11, "q8_0": 0.5 / 127 + 2**-11}


@pytest.mark.parametrize("cache_type", ROUNDING)
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_rounded_caches(kind: str, cache_type: str) -> None:
    layer, w = make_mla() if kind == "mla" else make_gqa()
    g: Any = MLA if kind == "mla" else GQA
    x = hidden_states(rng(), 50)
    exact = getattr(oracle, kind + "_rows")(x.astype(np.float64), w, g)
    cache = new_cache(kind, 50, cache_type)
    y = run(layer, x, cache, [30, 20])
    rows = floats(cache, 50)
    blocks = np.abs(exact).reshape(50, -1, 32).max(-1).repeat(32, 1)
    largest = np.abs(exact) + 2**-14 if cache_type == "f16" else blocks
    assert (np.abs(rows - exact) <= 1.01 * ROUNDING[cache_type] * largest + 1e-6).all()
    assert_near(y, getattr(oracle, kind)(x.astype(np.float64), w, g, rows.astype(np.float64)))


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_long_context(kind: str) -> None:
    """Long enough for the context of one token to be cut into chunks, the last one ragged."""
    layer, w = make_mla() if kind == "mla" else make_gqa()
    g: Any = MLA if kind == "mla" else GQA
    x = hidden_states(rng(), 1307)
    y = run(layer, x, new_cache(kind, 1307), [1000, 300, 1, 1, 5])
    assert_near(y, getattr(oracle, kind)(x.astype(np.float64), w, g))


def test_large_scores_do_not_overflow() -> None:
    w = mla_weights(MLA)
    w["q"] *= 300
    layer = OPS.mla(mla_tensors(w, MLA, legacy=False), MLA)
    x = hidden_states(rng(), 150)
    y = run(layer, x, new_cache("mla", 150), [149, 1])
    # Scores of a few hundred, rounded to float32, move a weight by up to 1e-4.
    assert_near(y, oracle.mla(x.astype(np.float64), w, MLA), 3e-4)


# ---- feed-forward ----


def test_ffn() -> None:
    r = rng(3)
    w = {
        "norm": norm_weight(r, HIDDEN),
        "gate": matrix(r, 200, HIDDEN),
        "up": matrix(r, 200, HIDDEN),
        "down": matrix(r, HIDDEN, 200),
    }
    layer = OPS.ffn(FfnWeights(**{name: tensor(value, name) for name, value in w.items()}), EPS)
    for n in (1, 2, 45):
        x = hidden_states(r, n)
        assert_near(layer(x.copy()), oracle.ffn(x.astype(np.float64), w, EPS))


ROUTERS = {
    f"{gating}-{'bias' if bias else 'plain'}-{groups or 'flat'}-{'norm' if normalize else 'raw'}": (
        Router(12, 4, gating, normalize, scale, 4 if groups else 1, 2 if groups else 1, groups)
        if groups
        else Router(12, 4, gating, normalize, scale),
        bias,
    )
    for (gating, bias, groups), (normalize, scale) in product(
        product(Gating, [False, True], [None, GroupScore.MAX, GroupScore.TOP2_SUM]),
        [(False, 1.0), (True, 2.5)],
    )
}


@pytest.mark.parametrize(("router", "bias"), ROUTERS.values(), ids=ROUTERS)
def test_moe(router: Router, bias: bool) -> None:
    for fused, shared in product([False, True], [False, True]):
        w = moe_weights(router.n_experts, bias=bias, shared=shared)
        layer = OPS.moe(moe_tensors(w, fused=fused), router, EPS)
        for n in (1, 37):
            x = hidden_states(rng(n), n)
            exact = x.astype(np.float64)
            logits = oracle.rms_norm(exact, w["norm"], EPS) @ w["router"].T
            ids, weights = layer.route(x)
            for t in range(n):
                expected = oracle.route(logits[t], router, w.get("router_bias"))
                assert ids[t].tolist() == expected[0]
                assert_near(weights[t], np.array(expected[1]))
            assert_near(layer(x.copy()), oracle.moe(exact, w, router, EPS))


def test_ties_go_to_the_lower_expert() -> None:
    w = moe_weights(12, bias=False, shared=False)
    w["router"][:] = 0
    layer = OPS.moe(moe_tensors(w), Router(12, 4, Gating.SOFTMAX, False, 1.0), EPS)
    ids, weights = layer.route(hidden_states(rng(), 3))
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    np.testing.assert_allclose(weights, 1 / 12, rtol=1e-6)


@pytest.mark.parametrize("gating", Gating)
def test_nan_and_infinity_choose_valid_experts(gating: Gating) -> None:
    w = moe_weights(12, bias=True, shared=True)
    router = Router(12, 4, gating, True, 1.0, 4, 2, GroupScore.TOP2_SUM)
    layer = OPS.moe(moe_tensors(w), router, EPS)
    x = hidden_states(rng(), 4)
    x[0] = np.nan
    x[1] = np.inf
    x[2, 5] = np.nan
    ids, _ = layer.route(x)
    for row in ids.tolist():
        assert len(set(row)) == 4
        assert all(0 <= e < 12 for e in row)
    assert np.isfinite(layer(x)[3]).all()


# ---- quantized weights ----


def rounded(values: Floats) -> Floats:
    """The values as Q8_0 holds them."""
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(values), kind), kind)


def rounded_weights(w: dict[str, Floats]) -> dict[str, Floats]:
    return {
        name: value if value.ndim == 1 or name == "router" else rounded(value)
        for name, value in w.items()
    }


def rounded_split(kv_b: Floats, g: MlaShape) -> Floats:
    """kv_b from a split k_b and v_b, where the keys are transposed and rounded the other way."""
    keys, values = np.split(kv_b.reshape(g.heads, -1, g.kv_rank), [g.nope], axis=1)
    keys = rounded(keys.transpose(0, 2, 1)).transpose(0, 2, 1)
    return np.concatenate([keys, rounded(values)], 1).reshape(-1, g.kv_rank)


def assert_rounding_apart(actual: Any, expected: Any) -> None:
    """Rounding to 8 bits before a product adds 0.5% of its norm; MLA has six products in a row.

    (The largest of 32 normal values is 2.2 deviations; a step is that / 127, its error / sqrt(12).)
    """
    assert np.linalg.norm(actual - expected) <= 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("kind", ["mla", "legacy mla", "gqa"])
def test_attention_with_quantized_weights(kind: str, n: int) -> None:
    if kind == "gqa":
        layer, w = make_gqa(GGMLType.Q8_0)
    else:
        layer, w = make_mla(BLOCK_MLA, 32, legacy=kind == "legacy mla", kind=GGMLType.Q8_0)
    weights = rounded_weights(w)
    if kind == "mla":
        weights["kv_b"] = rounded_split(w["kv_b"], BLOCK_MLA)
    x = hidden_states(rng(), n)
    y = run(layer, x, new_cache(kind[-3:], n), [n])
    exact = x.astype(np.float64)
    expected = (
        oracle.gqa(exact, weights, GQA) if kind == "gqa" else oracle.mla(exact, weights, BLOCK_MLA)
    )
    assert_rounding_apart(y - x, expected - x)


@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_with_quantized_weights(fused: bool, n: int) -> None:
    w = moe_weights(12, bias=True, shared=True)
    router = Router(12, 4, Gating.SIGMOID, True, 2.5)
    layer = OPS.moe(moe_tensors(w, fused=fused, kind=GGMLType.Q8_0), router, EPS)
    x = hidden_states(rng(), n)
    expected = oracle.moe(x.astype(np.float64), rounded_weights(w), router, EPS)
    assert_rounding_apart(layer(x.copy()) - x, expected - x)


def test_experts_with_mixed_types() -> None:
    """Quantizers give each matrix its own type: one input then serves in float32 and in 8 bits."""
    w = moe_weights(12, bias=False, shared=True)
    plain = moe_tensors(w)
    quantized = moe_tensors(w, kind=GGMLType.Q8_0)
    mixed = replace(quantized, up=plain.up, shared_gate=plain.shared_gate, down=plain.down)
    weights = rounded_weights(w) | {name: w[name] for name in ("up", "shared_gate", "down")}
    router = Router(12, 4, Gating.SOFTMAX, True, 1.0)
    x = hidden_states(rng(), 9)
    expected = oracle.moe(x.astype(np.float64), weights, router, EPS)
    assert_rounding_apart(OPS.moe(mixed, router, EPS)(x.copy()) - x, expected - x)


# ---- the ends ----


def test_embedding_and_head() -> None:
    r = rng(5)
    table = matrix(r, 100, HIDDEN)
    norm = norm_weight(r, HIDDEN)
    x = OPS.embedding(tensor(table))(np.array([7, 0, 99, 7], np.int32))
    np.testing.assert_array_equal(x, table[[7, 0, 99, 7]])
    head = OPS.head(tensor(norm), tensor(table), EPS)
    expected = oracle.rms_norm(x.astype(np.float64), norm, EPS) @ table.T
    assert_near(head(x, last_only=False), expected)
    assert_near(head(x, last_only=True), expected[-1:])


@pytest.mark.parametrize("bad", [-1, 100])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    embedding = OPS.embedding(tensor(matrix(rng(), 100, HIDDEN)))
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 100"):
        embedding(np.array([1, bad], np.int32))


# ---- threads ----


def attend_quantized(kind: str) -> Floats:
    if kind == "mla":
        layer, _ = make_mla(BLOCK_MLA, 32, kind=GGMLType.Q8_0)
    else:
        layer, _ = make_gqa(GGMLType.Q8_0)
    x = hidden_states(rng(), 700)
    return run(layer, x, new_cache(kind, 700, "f16"), [600, 97, 1, 1, 1])


def moe_quantized(n: int) -> Floats:
    w = moe_weights(12, bias=True, shared=True)
    router = Router(12, 4, Gating.SIGMOID, True, 2.5)
    return OPS.moe(moe_tensors(w, kind=GGMLType.Q8_0), router, EPS)(hidden_states(rng(6), n))


CALLS: dict[str, Callable[[], Floats]] = {
    "mla": lambda: attend_quantized("mla"),
    "gqa": lambda: attend_quantized("gqa"),
    "moe, one token": lambda: moe_quantized(1),
    "moe, many tokens": lambda: moe_quantized(200),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_threads_do_not_change_a_bit(call: Callable[[], Floats]) -> None:
    results = []
    for threads in (1, 2, 3, 4):
        _native.set_threads(threads)
        results.append(call())
    assert np.isfinite(results[0]).all()
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


# ---- errors ----


def test_wrong_shapes_name_the_tensor() -> None:
    w = mla_weights(MLA)
    w["kv_a"] = w["kv_a"][:-1]
    with pytest.raises(ValueError, match=r"'kv_a' has shape \{64, 63\}, expected \{64, 64\}"):
        OPS.mla(mla_tensors(w, MLA, legacy=False), MLA)

    w = mla_weights(MLA)
    w["kv_b"] = np.concatenate([w["kv_b"], w["kv_b"]])
    with pytest.raises(ValueError, match=r"'kv_b' has shape \{56, 320\}, expected \{56, 160\}"):
        OPS.mla(mla_tensors(w, MLA, legacy=True), MLA)

    w = moe_weights(12, bias=True, shared=False)
    router = Router(8, 4, Gating.SOFTMAX, False, 1.0)
    with pytest.raises(ValueError, match=r"'down' has shape \{64, 64, 12\}, expected \{64, 64, 8"):
        OPS.moe(moe_tensors(w), router, EPS)


def test_missing_parts_are_named() -> None:
    tensors = mla_tensors(mla_weights(MLA), MLA, legacy=False)
    with pytest.raises(ValueError, match="needs v_b"):
        OPS.mla(MlaWeights(tensors.norm, tensors.kv_a, tensors.kv_a_norm, tensors.output,
                           q=tensors.q, k_b=tensors.k_b), MLA)  # fmt: skip


def test_types_that_cannot_be_computed() -> None:
    odd = Tensor("blk.3.up", GGMLType.IQ2_XXS, (256, 4), np.zeros(264, np.uint8), 0, Path("x"))
    with pytest.raises(ValueError, match=r"'blk.3.up' has type IQ2_XXS.*requantize"):
        OPS.embedding(odd)
    with pytest.raises(ValueError, match=r"'gain' has type Q8_0, expected a vector"):
        OPS.head(
            tensor(np.ones(64, np.float32), "gain", GGMLType.Q8_0),
            tensor(np.eye(64, dtype=np.float32)),
            EPS,
        )


def test_half_precision_norms() -> None:
    r = rng(5)
    gain = norm_weight(r, HIDDEN).astype(np.float16).astype(np.float32)
    output = tensor(matrix(r, 10, HIDDEN))
    x = hidden_states(r, 2)
    expected = OPS.head(tensor(gain), output, EPS)(x, last_only=False)
    for kind, bound in ((GGMLType.F16, 0), (GGMLType.BF16, 2**-8)):
        half = OPS.head(tensor(gain, "gain", kind), output, EPS)
        assert_near(half(x, last_only=False), expected, bound)


def test_router_that_cannot_choose() -> None:
    w = moe_weights(12, bias=False, shared=False)
    for router, message in (
        (Router(12, 13, Gating.SOFTMAX, False, 1.0), "cannot choose 13 of 12"),
        (Router(12, 4, Gating.SOFTMAX, False, 1.0, 5, 2), "do not make 5 groups"),
        (Router(12, 4, Gating.SOFTMAX, False, 1.0, 4, 1), "not enough for 4 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.moe(moe_tensors(w), router, EPS)


def test_calls_that_do_not_fit() -> None:
    layer, _ = make_mla()
    cache = new_cache("mla", 10)
    x = hidden_states(rng(), 4)
    with pytest.raises(ValueError, match="no room for 4 rows after 7, the capacity is 10"):
        layer(x, cache, 7)
    with pytest.raises(ValueError, match="no room"):
        layer(x, cache, -1)
    with pytest.raises(ValueError, match="rows of 128 values, this layer needs 64"):
        layer(x, new_cache("gqa", 10), 0)
    with pytest.raises(ValueError, match="rows of 60 values, expected 64"):
        layer(np.zeros((4, 60), np.float32), cache, 0)
    for wrong in (x.astype(np.float64), x[:, ::2], np.asfortranarray(x)):
        with pytest.raises(TypeError):
            layer(wrong, cache, 0)
    assert (cache.data == 0xAB).all()


def test_no_tokens() -> None:
    layer, _ = make_mla()
    assert layer(np.empty((0, HIDDEN), np.float32), new_cache("mla", 4), 4).shape == (0, HIDDEN)

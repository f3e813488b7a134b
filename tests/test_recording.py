"""Sums of squared inputs against layers written in numpy float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import layer_oracle as oracle
import numpy as np
import pytest
from layer_cases import (
    EPS,
    GQA,
    HIDDEN,
    MLA,
    gqa_layer_weights,
    hidden_states,
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
from localds.ops import FfnWeights, Gating, GqaWeights, Router
from localds.ops.cpu import CpuOps
from localds.ops.recording import InputSums, Recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Inputs = Mapping[str, list[NDArray[np.float64]]]
    """By tensor name, the rows that each of its matrices was multiplied with."""


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = _native.threads()
    _native.set_threads(2)
    yield
    _native.set_threads(before)


def check(sums: dict[str, InputSums], inputs: Inputs) -> None:
    assert sums.keys() == inputs.keys()
    for name, matrices in inputs.items():
        assert sums[name].counts.tolist() == [len(rows) for rows in matrices], name
        expected = np.stack([(rows**2).sum(0) for rows in matrices])
        assert sums[name].squares.shape == expected.shape, name
        np.testing.assert_allclose(sums[name].squares, expected, rtol=2e-4, err_msg=name)


def by_head(x: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return list(x.transpose(1, 0, 2))


def mla_inputs(x: Any, w: dict[str, Any], *, legacy: bool) -> Inputs:
    hidden = oracle.rms_norm(x, w["norm"], EPS)
    rows = oracle.mla_rows(x, w, MLA)
    q, k, v = oracle.mla_heads(x, w, MLA, rows)
    latents = rows[:, : MLA.kv_rank]
    values = oracle.causal_attention(q, k, v, MLA.softmax_scale)
    inputs = {"kv_a": [hidden], "output": [values.reshape(len(x), -1)]}
    if "q_a" in w:
        low = oracle.rms_norm(hidden @ w["q_a"].T, w["q_a_norm"], MLA.latent_eps)
        inputs |= {"q_a": [hidden], "q_b": [low]}
    else:
        inputs |= {"q": [hidden]}
    if legacy:
        return inputs | {"kv_b": [latents]}
    shared = np.broadcast_to(latents[:, None], (len(x), MLA.heads, MLA.kv_rank))
    context = oracle.causal_attention(q, k, shared, MLA.softmax_scale)
    return inputs | {"k_b": by_head(q[..., : MLA.nope]), "v_b": by_head(context)}


@pytest.mark.parametrize("q_rank", [0, 40])
@pytest.mark.parametrize("legacy", [False, True])
def test_mla(legacy: bool, q_rank: int) -> None:
    w = mla_weights(MLA, q_rank)
    recording = Recording()
    layer = CpuOps(recording).mla(mla_tensors(w, MLA, legacy=legacy), MLA)
    # Long enough for keys and values to be expanded, were nobody recording.
    x = hidden_states(rng(), 300)
    cache = new_cache("mla", 300)
    exact = x.astype(np.float64)
    y = np.concatenate([layer(x[:200].copy(), cache, 0), layer(x[200:].copy(), cache, 200)])
    check(recording.sums(), mla_inputs(exact, w, legacy=legacy))
    assert np.abs(y - oracle.mla(exact, w, MLA)).max() < 1e-4


def test_gqa() -> None:
    w = gqa_layer_weights()
    recording = Recording()
    weights = GqaWeights(**{name: tensor(value, name) for name, value in w.items()})
    layer = CpuOps(recording).gqa(weights, GQA)
    x = hidden_states(rng(), 30)
    cache = new_cache("gqa", 30)
    for past in range(0, 30, 10):
        layer(x[past : past + 10].copy(), cache, past)
    exact = x.astype(np.float64)
    hidden = oracle.rms_norm(exact, w["norm"], EPS)
    heads = oracle.gqa_heads(exact, w, GQA, oracle.gqa_rows(exact, w, GQA))
    values = oracle.causal_attention(*heads, GQA.softmax_scale).reshape(30, -1)
    check(recording.sums(), {"q": [hidden], "k": [hidden], "v": [hidden], "output": [values]})


def test_ffn() -> None:
    r = rng(3)
    w = {
        "norm": norm_weight(r, HIDDEN),
        "gate": matrix(r, 600, HIDDEN),  # wider than what one task sums
        "up": matrix(r, 600, HIDDEN),
        "down": matrix(r, HIDDEN, 600),
    }
    recording = Recording()
    weights = FfnWeights(**{name: tensor(value, name) for name, value in w.items()})
    layer = CpuOps(recording).ffn(weights, EPS)
    x = hidden_states(r, 45)
    layer(x[:1].copy())
    layer(x[1:].copy())
    hidden = oracle.rms_norm(x.astype(np.float64), w["norm"], EPS)
    middle = oracle.gated_middle(hidden, w["gate"], w["up"])
    check(recording.sums(), {"gate": [hidden], "up": [hidden], "down": [middle]})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_moe(fused: bool, shared: bool) -> None:
    router = Router(12, 4, Gating.SIGMOID, True, 2.5)
    w = moe_weights(12, bias=True, shared=shared)
    w["router_bias"][5] = -10  # never chosen
    recording = Recording()
    layer = CpuOps(recording).moe(moe_tensors(w, fused=fused), router, EPS)
    x = hidden_states(rng(), 40)
    layer(x[:33].copy())
    layer(x[33:].copy())

    hidden = oracle.rms_norm(x.astype(np.float64), w["norm"], EPS)
    logits = hidden @ w["router"].T
    chosen = [oracle.route(row, router, w["router_bias"])[0] for row in logits]
    experts = [hidden[[e in ids for ids in chosen]] for e in range(12)]
    middles = [
        oracle.gated_middle(rows, gate, up)
        for rows, gate, up in zip(experts, w["gate"], w["up"], strict=True)
    ]
    inputs = {"router": [hidden], "down": middles}
    inputs |= {"gate_up": experts} if fused else {"gate": experts, "up": experts}
    if shared:
        middle = oracle.gated_middle(hidden, w["shared_gate"], w["shared_up"])
        inputs |= {"shared_gate": [hidden], "shared_up": [hidden], "shared_down": [middle]}
    assert len(experts[5]) == 0
    check(recording.sums(), inputs)


def test_head_and_layers_that_did_not_run() -> None:
    r = rng()
    w = {"norm": norm_weight(r, HIDDEN), "output": matrix(r, 50, HIDDEN)}
    recording = Recording()
    head = CpuOps(recording).head(tensor(w["norm"], "norm"), tensor(w["output"], "output"), EPS)
    assert recording.sums() == {}
    x = hidden_states(r, 7)
    head(x, last_only=False)
    check(recording.sums(), {"output": [oracle.rms_norm(x.astype(np.float64), w["norm"], EPS)]})


def test_sums_do_not_depend_on_threads() -> None:
    w = moe_weights(12, bias=False, shared=True)
    sums = []
    for threads in (1, 3):
        _native.set_threads(threads)
        recording = Recording()
        CpuOps(recording).moe(moe_tensors(w), Router(12, 4, Gating.SOFTMAX, False, 1.0), EPS)(
            hidden_states(rng(), 64)
        )
        sums.append(recording.sums())
    for name in sums[0]:
        assert (sums[0][name].squares == sums[1][name].squares).all()

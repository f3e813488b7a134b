"""Experts that a GPU leaves to the CPU, and those that go to it from the store."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gguf.quants
import ggufs
import layer_oracle as oracle
import numpy as np
import pytest
from layer_cases import EPS, HIDDEN, hidden_states, moe_tensors, moe_weights, rng

from localds import _native
from localds.gguf import GGMLType, GGUFFile
from localds.memory.experts import ExpertStore
from localds.memory.placement import Placement
from localds.ops import Gating, MoeWeights, Router
from localds.ops.cpu import CpuOps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.ops.cpu import CpuMoe

    Floats = NDArray[np.float32]
    Ids = NDArray[np.int32]

EXPERTS, TOP_K = 12, 4
ROUTER = Router(EXPERTS, TOP_K, Gating.SIGMOID, True, 2.5)

ELSEWHERE = {"none": [], "some": [0, 3, 4, 9, 11], "all": list(range(EXPERTS))}


def mask_of(experts: list[int]) -> NDArray[np.uint8]:
    mask = np.zeros(EXPERTS, np.uint8)
    mask[experts] = 1
    return mask


def choices(n: int) -> tuple[Ids, Floats]:
    """What no router would choose, in no order."""
    r = rng(n + 100)
    ids = np.array([r.permutation(EXPERTS)[:TOP_K] for _ in range(n)], np.int32)
    return ids, r.uniform(-1, 2, (n, TOP_K)).astype(np.float32)


def dequantized(w: dict[str, Floats], kind: GGMLType) -> dict[str, Floats]:
    """The experts' weights as the type holds them."""
    held = gguf.GGMLQuantizationType(kind)
    return w | {
        name: gguf.quants.dequantize(gguf.quants.quantize(w[name], held), held)
        for name in ("gate", "up", "down")
    }


def rest(x: Floats, w: dict[str, Floats], choice: tuple[Ids, Floats], elsewhere: list[int]) -> Any:
    """What the experts that are not elsewhere add, in float64."""
    exact: dict[str, Any] = {name: value.astype(np.float64) for name, value in w.items()}
    h = oracle.rms_norm(x.astype(np.float64), exact["norm"], EPS)
    out = np.zeros_like(h)
    for t, (ids, weights) in enumerate(zip(*choice, strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            if e not in elsewhere:
                out[t] += weight * oracle.gated(
                    h[t], exact["gate"][e], exact["up"][e], exact["down"][e]
                )
    return out


def assert_rest(added: Floats, start: Floats, expected: Any, kind: GGMLType) -> None:
    """The bounds of test_ops_cpu: rounding to float32, or to 8 bits before each product."""
    if not expected.any():
        np.testing.assert_array_equal(added, start)
    elif kind == GGMLType.F32:
        exact = start + expected
        assert np.abs(added - exact).max() <= 1e-5 * np.abs(exact).max()
    else:
        assert np.linalg.norm(added - start - expected) <= 0.02 * np.linalg.norm(expected)


KINDS = [GGMLType.F32, GGMLType.Q8_0]
# Outputs are summed in the end up to 64 pairs, of 20 tokens only where some experts are elsewhere.
LENGTHS = [1, 9, 20, 40]


# ---- in the file's map ----


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("elsewhere", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_mapped(kind: GGMLType, fused: bool, elsewhere: list[int], n: int) -> None:
    w = moe_weights(EXPERTS, bias=True, shared=True)
    layer = CpuOps().moe(moe_tensors(w, fused=fused, kind=kind), ROUTER, EPS).layer
    layer.set_elsewhere(mask_of(elsewhere))
    x, choice = hidden_states(rng(n), n), choices(n)
    start = hidden_states(rng(7), n)
    before, out = x.copy(), start.copy()
    layer.add_rest(x, *choice, out)
    assert_rest(out, start, rest(x, dequantized(w, kind), choice, elsewhere), kind)
    np.testing.assert_array_equal(x, before)


def moe_layer(kind: GGMLType = GGMLType.F32) -> CpuMoe:
    w = moe_weights(EXPERTS, bias=True, shared=True)
    return CpuOps().moe(moe_tensors(w, kind=kind), ROUTER, EPS)


def test_out_may_be_x() -> None:
    layer = moe_layer().layer
    x, choice = hidden_states(rng(), 40), choices(40)
    apart = x.copy()
    layer.add_rest(x, *choice, apart)
    layer.add_rest(x, *choice, x)
    np.testing.assert_array_equal(x, apart)


@pytest.mark.parametrize("n", [1, 40])
def test_threads_do_not_change_a_bit(n: int) -> None:
    threads = _native.threads()
    results = []
    try:
        for count in (1, 2, 3):
            _native.set_threads(count)
            layer = moe_layer(GGMLType.Q8_0).layer
            layer.set_elsewhere(mask_of([2, 5]))
            out = np.zeros((n, HIDDEN), np.float32)
            layer.add_rest(hidden_states(rng(), n), *choices(n), out)
            results.append(out)
    finally:
        _native.set_threads(threads)
    assert results[0].any()
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_forward_runs_all() -> None:
    layer = moe_layer()
    x = hidden_states(rng(), 9)
    expected = layer(x.copy())
    layer.layer.set_elsewhere(mask_of([0, 1, 2, 3, 4, 5]))
    np.testing.assert_array_equal(layer(x.copy()), expected)


def test_uses_are_those_of_all_experts() -> None:
    layer = moe_layer().layer
    layer.set_elsewhere(mask_of([0, 1, 2]))
    total = np.zeros(EXPERTS, np.uint64)
    for n in (1, 40):
        ids, weights = choices(n)
        layer.add_rest(hidden_states(rng(), n), ids, weights, np.zeros((n, HIDDEN), np.float32))
        total += np.bincount(ids.ravel(), minlength=EXPERTS).astype(np.uint64)
        np.testing.assert_array_equal(layer.uses(), total)
    assert total[:3].all()


def test_calls_that_do_not_fit() -> None:
    layer = moe_layer().layer
    x, (ids, weights) = hidden_states(rng(), 3), choices(3)
    out = x.copy()
    for bad in (-1, EXPERTS):
        wrong = ids.copy()
        wrong[2, 1] = bad
        with pytest.raises(ValueError, match=f"no expert {bad} among 12"):
            layer.add_rest(x, wrong, weights, out)
    with pytest.raises(ValueError, match="ids has rows of 3 values, expected 4"):
        layer.add_rest(x, np.ascontiguousarray(ids[:, :3]), weights, out)
    with pytest.raises(ValueError, match="3 input rows, but 2 output rows"):
        layer.add_rest(x, ids, weights, out[:2])
    with pytest.raises(TypeError):
        layer.add_rest(x, ids.astype(np.int64), weights, out)
    with pytest.raises(ValueError, match="mask of 11 experts, expected 12"):
        layer.set_elsewhere(np.zeros(11, np.uint8))
    np.testing.assert_array_equal(out, x)
    assert not layer.uses().any()


def test_no_tokens() -> None:
    empty = np.empty((0, HIDDEN), np.float32)
    none = np.empty((0, TOP_K), np.float32)
    moe_layer().layer.add_rest(empty, none.astype(np.int32), none, empty)


# ---- on disk ----

WINDOW, AHEAD = 4, 2


@dataclass
class Stored:
    """Two layers whose experts lie in a file, and the store that reads them."""

    path: Path
    weights: list[dict[str, Floats]]
    tensors: list[MoeWeights]
    layers: list[CpuMoe]
    store: ExpertStore

    def parts(self, layer: int) -> list[NDArray[np.uint8]]:
        """The bytes of each part, [experts, bytes]."""
        w = self.tensors[layer]
        stacks = [t for t in (w.gate_up, w.gate, w.up, w.down) if t is not None]
        return [stack.data.reshape(EXPERTS, -1) for stack in stacks]


def write_experts(
    path: Path, kind: GGMLType, weights: list[dict[str, Floats]], fused: bool
) -> None:
    held = gguf.GGMLQuantizationType(kind)
    specs = []
    for block, w in enumerate(weights):
        stacks = {name: w[name] for name in ("gate", "up", "down")}
        if fused:
            stacks["gate_up"] = np.concatenate([stacks.pop("gate"), stacks.pop("up")], 1)
        for name, values in stacks.items():
            data = gguf.quants.quantize(values, held)
            shape = values.shape[::-1]
            specs.append(ggufs.tensor(f"blk.{block}.ffn_{name}_exps.weight", data, kind, shape))
    ggufs.write(path, {}, specs)


def with_experts(w: dict[str, Floats], file: GGUFFile, block: int) -> MoeWeights:
    """A layer's weights, the experts those of a file."""
    found: dict[str, Any] = {
        n: file.tensors.get(f"blk.{block}.ffn_{n}_exps.weight") for n in ("gate", "up", "gate_up")
    }
    down = file.tensors[f"blk.{block}.ffn_down_exps.weight"]
    return replace(moe_tensors(w), **found, down=down)


@pytest.fixture
def make_stored(tmp_path: Path) -> Callable[..., Stored]:
    def make(
        kind: GGMLType = GGMLType.F32, *, fused: bool = False, slots: int = WINDOW + AHEAD + 2
    ) -> Stored:
        weights = [moe_weights(EXPERTS, bias=True, shared=True, seed=seed) for seed in (4, 5)]
        path = tmp_path / "experts.gguf"
        write_experts(path, kind, weights, fused)
        file = GGUFFile.open(path)
        geometry: Any = SimpleNamespace(layers=2, experts=EXPERTS)
        plan: Any = None
        placement = Placement(
            plan, None, False, slots=slots, slots_total=2 * EXPERTS, window=WINDOW, ahead=AHEAD
        )
        store = ExpertStore(file, geometry, placement)
        tensors = [with_experts(w, file, block) for block, w in enumerate(weights)]
        ops = CpuOps(experts=store)
        layers = [ops.moe(t, ROUTER, EPS) for t in tensors]
        return Stored(path, weights, tensors, layers, store)

    return make


@pytest.mark.parametrize("elsewhere", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stored(
    make_stored: Callable[..., Stored], kind: GGMLType, fused: bool, elsewhere: list[int]
) -> None:
    """The same bits as from the map, whether experts have to be read or are in the pool already."""
    stored = make_stored(kind, fused=fused)
    mapped = [CpuOps().moe(tensors, ROUTER, EPS) for tensors in stored.tensors]
    for layer in (*stored.layers, *mapped):
        layer.layer.set_elsewhere(mask_of(elsewhere))
    for n in (*LENGTHS, 1, 1, 40, 9):
        x, choice = hidden_states(rng(n), n), choices(n)
        start = hidden_states(rng(7), n)
        for layer, same, w in zip(stored.layers, mapped, stored.weights, strict=True):
            out, from_map = start.copy(), start.copy()
            layer.layer.add_rest(x, *choice, out)
            same.layer.add_rest(x, *choice, from_map)
            np.testing.assert_array_equal(out, from_map)
            assert_rest(out, start, rest(x, dequantized(w, kind), choice, elsewhere), kind)
    for layer, same in zip(stored.layers, mapped, strict=True):
        np.testing.assert_array_equal(layer.layer.uses(), same.layer.uses())
    figures = stored.store.figures()
    assert (figures.uses > figures.hits) == (len(elsewhere) < EXPERTS)
    assert not stored.store.resident()[:, elsewhere].any()


@pytest.mark.parametrize("n", [1, 40])
def test_what_is_elsewhere_in_the_next_layer_is_not_expected(
    make_stored: Callable[..., Stored], n: int
) -> None:
    """Without the mask, places for reads ahead would go to the experts before the last one."""
    stored = make_stored()
    x, choice = hidden_states(rng(3), n), choices(n)
    last = int(stored.layers[1].route(x)[0][0, -1]) if n == 1 else EXPERTS - 1
    stored.layers[1].layer.set_elsewhere(mask_of([e for e in range(EXPERTS) if e != last]))
    stored.layers[0].layer.add_rest(x, *choice, np.zeros_like(x))
    deadline = time.monotonic() + 10
    while not stored.store.resident()[1].any() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert np.flatnonzero(stored.store.resident()[1]).tolist() == [last]


# ---- to a GPU ----


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fetch_gives_the_bytes_of_the_file(
    make_stored: Callable[..., Stored], kind: GGMLType, fused: bool
) -> None:
    """Of more experts than there are slots, too."""
    stored = make_stored(kind, fused=fused)
    for experts in (list(range(EXPERTS)), [5], [0, 1, 7, 11], [], list(range(EXPERTS))):
        ids = np.array(experts, np.int32)
        for number in (0, 1):
            assert stored.store.number(stored.tensors[number]) == number
            fetched = stored.store.fetch(number, ids, tokens=np.arange(len(ids)) + 1)
            for got, expected in zip(fetched, stored.parts(number), strict=True):
                np.testing.assert_array_equal(got, expected[ids])
    figures = stored.store.figures()
    assert figures.uses == 2 * (2 * EXPERTS + 5)
    assert figures.read_bytes > 0


def test_tokens_of_fetched_experts_are_counted(make_stored: Callable[..., Stored]) -> None:
    store = make_stored().store
    store.fetch(0, np.array([1, 4], np.int32), tokens=np.array([3, 5]))
    store.fetch(1, np.array([2], np.int32), tokens=7)
    store.fetch(1, np.array([9], np.int32))
    expected = np.zeros((2, EXPERTS), np.uint32)
    expected[0, [1, 4]] = 3, 5
    expected[1, [2, 9]] = 7, 1
    np.testing.assert_array_equal(store.counts(), expected)


def test_a_prompt_fetched_in_parts_displaces_nothing(make_stored: Callable[..., Stored]) -> None:
    """Parts of a layer are of one pass: none seems more popular than layers still to come."""
    store = make_stored(slots=WINDOW + AHEAD + 6).store
    counts = np.zeros((2, EXPERTS), np.uint32)
    counts[1, :6] = 1
    store.warm(counts)
    store.wait_warm()
    for first in range(0, EXPERTS, 3):
        store.fetch(0, np.arange(first, first + 3, dtype=np.int32), tokens=100)
    assert store.resident()[1, :6].all()
    store.fetch(1, np.arange(EXPERTS, dtype=np.int32), tokens=100)
    assert store.resident()[1, :6].all()


def test_fetch_refuses(make_stored: Callable[..., Stored]) -> None:
    store = make_stored().store
    for bad, message in (
        ([0, 12], "no expert 12 among 12"),
        ([-1, 3], "no expert -1 among 12"),
        ([3, 3], "must ascend, but 3 follows 3"),
        ([4, 2], "must ascend, but 2 follows 4"),
    ):
        with pytest.raises(ValueError, match=message):
            store.fetch(0, np.array(bad, np.int32))
    ids = np.array([1, 2], np.int32)
    with pytest.raises(ValueError, match="tokens of 3 experts, but 2 experts"):
        store.fetch(0, ids, tokens=np.array([1, 2, 3]))
    size = HIDDEN * 64 * 4
    outs = [np.zeros((2, size), np.uint8) for _ in range(3)]
    with pytest.raises(ValueError, match="no layer 2 among 2"):
        store.native.fetch(2, ids, outs, 1)
    with pytest.raises(ValueError, match="2 outs for 3 parts"):
        store.native.fetch(0, ids, outs[:2], 1)
    with pytest.raises(ValueError, match=rf"out 2 has shape \[1, {size}\], expected \[2, {size}\]"):
        store.native.fetch(0, ids, [*outs[:2], outs[2][:1]], 1)
    outs[0].flags.writeable = False
    for wrong in (outs, [out[:, ::2] for out in outs], [out.view(np.int8) for out in outs]):
        with pytest.raises(TypeError):
            store.native.fetch(0, ids, wrong, 1)  # type: ignore[arg-type]
    assert store.figures().uses == 0


def test_fetch_from_a_file_cut_short(make_stored: Callable[..., Stored]) -> None:
    stored = make_stored()
    os.truncate(stored.path, stored.path.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(_native.ReadError, match=r"layer 1, expert \d+: the file was cut short"):
            stored.store.fetch(1, np.arange(EXPERTS, dtype=np.int32))

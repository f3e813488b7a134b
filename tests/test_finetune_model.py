"""The differentiable model: its logits, its losses, and what must not have an influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoints import VOCABULARY
from derive_gguf import rewrite
from test_golden import DERIVED, assert_close, ggufs, golden

import localds
from localds.finetune.config import TARGETS, AdapterConfig
from localds.gguf import GGUFFile

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.finetune.model import (  # noqa: E402
    Adapter,
    Trained,
    TrainModel,
    updated_biases,
)
from localds.finetune.model.adapter import Linear  # noqa: E402
from localds.finetune.model.frozen import FrozenMatrix  # noqa: E402
from localds.finetune.model.gradients import with_vjp  # noqa: E402
from localds.finetune.model.routing import balance_loss, count_loads  # noqa: E402
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.matrix import PlainMatrix  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

MODELS = ["v2-lite", "v2", "v3", "kimi-k2", "mixtral"]


@dataclass
class Packed:
    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF files by name, each made once."""
    return ggufs(tmp_path_factory.mktemp("finetune"))


def open_model(path: Path, config: AdapterConfig, **options: Any) -> TrainModel:
    with GGUFFile.open(path) as gguf:
        return TrainModel(gguf, config, PORTABLE, mx.new_thread_unsafe_stream(mx.cpu), **options)


def one_batch(length: int, rows: int = 1, seed: int = 3) -> Packed:
    """Rows of one example each, all of whose targets count."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    return Packed(ids[:, :-1], ids[:, 1:].copy(), ones.astype(np.float32), ones, positions)


def shifted(model: TrainModel, size: float = 0.05) -> Any:
    """Parameters as after some training: no B is zero."""
    random = np.random.default_rng(5)

    def noise(array: Any, share: float) -> Any:
        return mx.array(random.standard_normal(array.shape).astype(np.float32) * share)

    moved = {}
    for name, values in model.init(1).items():
        moved[name] = {"a": values["a"], "b": noise(values["b"], size)}
        if "m" in values:
            moved[name]["m"] = values["m"] * (1 + noise(values["m"], 0.1))
    return moved


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two trees of parameters, relative to the largest value of each."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, values in expected.items():
        assert found[name].keys() == values.keys()
        for kind, value in values.items():
            wanted = np.array(value)
            error = np.abs(np.array(found[name][kind]) - wanted).max()
            worst = max(worst, float(error / np.abs(wanted).max()))
    return worst


@pytest.mark.parametrize("name", [*MODELS, *DERIVED])
def test_new_adapters_change_nothing(files: Callable[[str], Path], name: str) -> None:
    """The logits of transformers."""
    ids, expected = golden(DERIVED[name][0] if name in DERIVED else name)
    for method in ("lora", "dora"):
        model = open_model(files(name), AdapterConfig(rank=2, method=method, targets=TARGETS))
        logits = model.logits(model.init(1), np.array(ids, np.int32))
        assert_close(np.array(logits), expected)


# ---- adapters ----


def merged(source: Path, target: Path, parameters: Any, config: AdapterConfig) -> Path:
    """The float32 file with the adapters in its weights, in double precision."""

    def edit(tensors: Any) -> Any:
        changed = dict(tensors)
        for name, values in parameters.items():
            p = {kind: np.array(value, np.float64) for kind, value in values.items()}
            block = name.split(".attn_kv_b")[0]
            joint = name.endswith("attn_kv_b")
            if joint:
                keys = tensors[f"{block}.attn_k_b.weight"].swapaxes(1, 2)
                both = np.concatenate([keys, tensors[f"{block}.attn_v_b.weight"]], axis=1)
                weight = both.reshape(-1, both.shape[2])
            else:
                weight = tensors[f"{name}.weight"]
            weight = weight + config.scale * p["b"] @ p["a"]
            if "m" in p:
                length = np.linalg.norm(weight, axis=-1, keepdims=True)
                weight = weight * (p["m"][..., None] / length)
            weight = weight.astype(np.float32)
            if joint:
                both = weight.reshape(both.shape)
                changed[f"{block}.attn_k_b.weight"] = both[:, : keys.shape[1]].swapaxes(1, 2)
                changed[f"{block}.attn_v_b.weight"] = both[:, keys.shape[1] :]
            else:
                changed[f"{name}.weight"] = weight
        return changed

    return rewrite(source, target, {}, edit)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", ["v2-lite", "kimi-k2", "mixtral-wide"])
def test_adapters_compute_as_merged_weights(
    files: Callable[[str], Path], tmp_path: Path, name: str, method: Any
) -> None:
    """On every target: as the CPU path computes with the sums."""
    config = AdapterConfig(rank=4, alpha=6, method=method, targets=TARGETS)
    model = open_model(files(name), config)
    parameters = shifted(model)
    ids, base = golden(name)
    path = merged(files(name), tmp_path / "merged.gguf", parameters, config)
    with localds.load(path) as reference:
        expected = reference.logits(ids)
    assert np.abs(expected - base).max() > 0.1 * np.abs(base).max()
    assert_close(np.array(model.logits(parameters, np.array(ids, np.int32))), expected)


def test_the_fused_form_has_the_same_adapters(files: Callable[[str], Path]) -> None:
    config = AdapterConfig(rank=2, method="dora", targets=TARGETS)
    one, other = (open_model(files(name), config) for name in ("v3", "v3, fused gate_up"))
    batch = one_batch(12)
    (loss, _, _), gradient = one.value_and_grad(shifted(one), batch)
    (again, _, _), same = other.value_and_grad(shifted(other), batch)
    assert float(loss) == pytest.approx(float(again), rel=1e-6)
    assert difference(same, gradient) < 1e-5


def test_parameters_of_each_target(files: Callable[[str], Path]) -> None:
    """Names and shapes; A is uniform and seeded, B zero, m the lengths of rows."""
    model = open_model(files("v3"), AdapterConfig(rank=2, method="dora", targets=TARGETS))
    parameters = model.init(1)
    of_layer = {
        name.removeprefix("blk.2."): {kind: value.shape for kind, value in values.items()}
        for name, values in parameters.items()
        if name.startswith("blk.2.")
    }
    sizes = {
        "attn_q_a": (56, 64),
        "attn_q_b": (4 * 48, 56),
        "attn_kv_a_mqa": (48 + 16, 64),
        "attn_kv_b": (4 * (32 + 24), 48),
        "attn_output": (64, 4 * 24),
        "ffn_gate_inp": (8, 64),
        "ffn_gate_exps": (8, 40, 64),
        "ffn_up_exps": (8, 40, 64),
        "ffn_down_exps": (8, 64, 40),
        "ffn_gate_shexp": (40, 64),
        "ffn_up_shexp": (40, 64),
        "ffn_down_shexp": (64, 40),
    }
    assert of_layer == {
        name: {"a": (*stack, 2, columns), "b": (*stack, rows, 2), "m": (*stack, rows)}
        for name, (*stack, rows, columns) in sizes.items()
    }
    assert {"blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down"} < parameters.keys()
    a = np.array(parameters["blk.1.ffn_up_exps"]["a"])
    assert 0.98 / 8 < a.max() <= 1 / 8
    assert -1 / 8 <= a.min() < -0.98 / 8
    assert abs(a.mean()) < 0.01
    assert not np.array(parameters["blk.1.ffn_up_exps"]["b"]).any()
    assert (np.array(model.init(1)["blk.1.ffn_up_exps"]["a"]) == a).all()
    assert (np.array(model.init(2)["blk.1.ffn_up_exps"]["a"]) != a).mean() > 0.99


def test_dropout(files: Callable[[str], Path]) -> None:
    """Seeded, different in each adapter, of the given share, and none without a key."""
    model = open_model(files("v2-lite"), AdapterConfig(dropout=0.25, targets=("o_proj", "q_proj")))
    keys = mx.random.split(mx.random.key(1), len(model.adapters))
    with mx.stream(mx.cpu):
        one, other = (np.array(a.dropped(mx.ones((50, 40)), keys)) for a in model.adapters[:2])
    assert set(one.reshape(-1)) == {0, np.float32(1 / 0.75)}
    assert one.mean() == pytest.approx(1, abs=0.05)
    assert (one != other).any()
    p, batch = shifted(model), one_batch(12)
    losses = [
        float(model.loss(p, batch, key)[0])
        for key in (None, None, mx.random.key(1), mx.random.key(1), mx.random.key(2))
    ]
    assert losses[0] == losses[1] != losses[2] == losses[3] != losses[4]


def test_dropout_of_dora() -> None:
    """As PEFT has it: the share of W that DoRA adds drops out as well."""
    random = np.random.default_rng(1)
    w, x = random.standard_normal((6, 8)), random.standard_normal((5, 8))
    p = {kind: random.standard_normal(shape) for kind, shape in SHAPES.items()}
    squares = mx.array((w * w).sum(axis=1))
    adapter = Adapter("t", 0, (6, 8), 2, 0.5, 0.4, squares)
    linear = Linear(FrozenMatrix(PlainMatrix(mx.array(w))), adapter)
    keys = mx.random.split(mx.random.key(3), 1)
    trained = Trained({"t": {kind: mx.array(value) for kind, value in p.items()}}, keys)
    with mx.stream(mx.cpu):
        found = np.array(linear(mx.array(x), trained))
        dropped = np.array(adapter.dropped(mx.array(x), keys))
    added = 0.5 * p["b"] @ p["a"]
    gain = p["m"] / np.linalg.norm(w + added, axis=1)
    expected = x @ w.T + (gain - 1) * (dropped @ w.T) + gain * (dropped @ added.T)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


SHAPES = {"a": (2, 8), "b": (6, 2), "m": (6,)}


# ---- losses ----


def test_loss_is_the_cross_entropy(files: Callable[[str], Path]) -> None:
    """Of the targets that count, by the CPU path's logits."""
    model = open_model(files("v3"), AdapterConfig(rank=2, targets=("o_proj",)))
    batch = one_batch(20)
    batch.weights[0, [2, 3, 11]] = 0
    batch.targets[0, 3] = -100
    loss, count, _ = model.loss(model.init(1), batch)
    with localds.load(files("v3")) as reference:
        logits = reference.logits(batch.ids[0].tolist()).astype(np.float64)
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    kept = np.flatnonzero(batch.weights[0])
    expected = -log[kept, batch.targets[0, kept]].sum()
    assert count == 17
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(model.evaluate(model.init(1), batch)[0]) == pytest.approx(expected, rel=1e-5)


def packed(batches: list[Packed], length: int, padding: int = 0) -> Packed:
    """Examples of one row each, one after the other in a row of `length`."""
    fields = {}
    for name in ("ids", "targets", "weights", "positions"):
        values = np.concatenate([getattr(batch, name)[0] for batch in batches])
        rest = np.full(length - len(values), padding if name in ("ids", "targets") else 0)
        fields[name] = np.concatenate([values, rest]).astype(values.dtype)[None]
    segments = np.concatenate(
        [np.full(batch.ids.shape[1], number + 1) for number, batch in enumerate(batches)]
    )
    segments = np.pad(segments, (0, length - len(segments))).astype(np.int32)[None]
    return Packed(**fields, segments=segments)


@pytest.mark.parametrize("name", ["v2-lite", "v3", "mixtral"])
def test_packed_examples_do_not_see_each_other(files: Callable[[str], Path], name: str) -> None:
    """Losses, gradients and loads add up, whatever the padding."""
    model = open_model(files(name), AdapterConfig(rank=2, targets=("q_proj", "q_b_proj", "o_proj")))
    p = shifted(model)
    single = [one_batch(length, seed=length) for length in (7, 12, 5)]
    alone = [model.value_and_grad(p, batch) for batch in single]
    for padding in (0, 77):
        (loss, count, balance), gradient = model.value_and_grad(p, packed(single, 30, padding))
        assert count == 24
        assert float(loss) == pytest.approx(sum(float(of[0]) for of, _ in alone), rel=1e-5)
        sums = {
            name: {kind: sum(part[name][kind] for _, part in alone) for kind in values}
            for name, values in gradient.items()
        }
        assert difference(gradient, sums) < 1e-4
        assert (np.array(balance.loads) == sum(np.array(of[2].loads) for of, _ in alone)).all()


def test_padding_counts_nowhere(files: Callable[[str], Path]) -> None:
    """Neither in the auxiliary loss nor in the loads, even if the batch gives it weight."""
    model = open_model(files("v2"), AdapterConfig(rank=2, targets=("router", "experts")))
    p, found = shifted(model), []
    for padding in (1, 200):
        batch = packed([one_batch(9)], 20, padding)
        batch.weights[:, 9:] = padding
        (loss, count, balance), gradient = model.value_and_grad(p, batch)
        found.append((float(loss), count, float(balance.loss), np.array(balance.loads), gradient))
    one, other = found
    assert one[:3] == other[:3]
    assert one[1] == 9
    assert one[2] > 0
    assert (one[3] == other[3]).all()
    assert (one[3].sum(axis=1) == 9 * 3).all()
    assert difference(other[4], one[4]) == 0


def test_a_batch_where_nothing_counts(files: Callable[[str], Path]) -> None:
    model = open_model(files("v3"), AdapterConfig(rank=2))
    batch = one_batch(6)
    batch.weights[:] = 0
    (loss, count, _), gradient = model.value_and_grad(shifted(model), batch)
    assert (float(loss), count) == (0, 0)
    assert not any(np.array(value).any() for of in gradient.values() for value in of.values())


# ---- balance ----


def test_auxiliary_loss() -> None:
    """DeepSeek-V2's formulas, of two rows of which one has padding, and one of padding alone."""
    experts, top_k, lengths = 6, 2, (5, 3, 0)
    random = np.random.default_rng(2)
    logits = random.standard_normal((3, 5, experts))
    ids = np.stack([random.permutation(experts)[:top_k] for _ in range(15)])
    real = np.arange(5) < np.array(lengths)[:, None]
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = 0.0
    for row, length in enumerate(lengths[:2]):
        for expert in range(experts):
            sent = (ids.reshape(3, 5, top_k)[row, :length] == expert).sum()
            share = sent * experts / (top_k * length)
            expected += share * scores[row, :length, expert].sum() / length / 2
    with mx.stream(mx.cpu):
        flags = mx.array(real.astype(np.float32))
        loads = count_loads(mx.array(ids.astype(np.uint32)), flags, experts)
        flat = mx.array(logits.reshape(15, -1).astype(np.float32))
        found = float(balance_loss(flat, loads, flags, top_k))
    assert np.array(loads).sum() == 16
    assert found == pytest.approx(expected, rel=1e-5)


def test_who_gets_the_auxiliary_loss(files: Callable[[str], Path]) -> None:
    """Softmax routers, if they or the experts are trained; the loss holds it once per token."""
    batch = one_batch(8, rows=2)
    for name, target, has in [
        ("v2-lite", "o_proj", False),
        ("v2-lite", "router", True),
        ("v2-lite", "experts", True),
        ("mixtral", "router", True),
        ("v3", "router", False),
    ]:
        model = open_model(files(name), AdapterConfig(rank=2, targets=(target,)), aux_alpha=0.5)
        p = shifted(model)
        loss, count, balance = model.loss(p, batch)
        entropy, _, _ = model.evaluate(p, batch)
        auxiliary = float(balance.loss)
        assert (auxiliary > 0) == has
        # If all experts had as many tokens, each layer would have 0.5.
        assert auxiliary == 0 or auxiliary > 0.4 * len(model.expert_layers)
        assert float(loss) == pytest.approx(float(entropy) + count * auxiliary, rel=1e-5)


def test_biases_move_against_the_load() -> None:
    biases = mx.array([[0.5, 0.0, -0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    loads = mx.array([[10.0, 4.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    with mx.stream(mx.cpu):
        changed = np.array(updated_biases(biases, loads, 0.125))
    assert (changed == [[0.375, 0, -0.125, 0.125], [0, 0, 0, 0]]).all()


def test_biases_decide_who_is_chosen(files: Callable[[str], Path]) -> None:
    model = open_model(files("v3"), AdapterConfig(rank=2, targets=("router",)))
    p, batch = shifted(model), one_batch(15)
    biases = model.biases()
    assert model.expert_layers == (1, 2)
    assert biases.shape == (2, 8)
    plain, _, before = model.loss(p, batch)
    same, _, _ = model.loss(p, batch, None, biases)
    assert float(plain) == float(same)
    pushed = np.array(biases)
    pushed[1, 5] = 100
    _, _, after = model.loss(p, batch, None, mx.array(pushed))
    loads = np.array(after.loads)
    assert (loads[0] == np.array(before.loads)[0]).all()
    assert loads[1, 5] == 15
    assert (loads.sum(axis=1) == 15 * 3).all()
    assert np.array(after.shares())[1, 5] == pytest.approx(1 / 3)
    assert np.array(after.unevenness())[1] == pytest.approx(8 / 3)
    assert open_model(files("v2-lite"), AdapterConfig()).biases() is None


# ---- experts elsewhere ----


@dataclass
class HostExperts:
    """Experts of a file in numpy, as if they lay on the host."""

    gate: Any
    up: Any
    down: Any

    def chosen(self, x: Any, ids: Any, trained: Trained) -> Any:
        del trained
        mx.eval(ids)
        experts = np.array(ids)
        assert (np.diff(experts.astype(np.int64)) >= 0).all()

        def middle(x: Any) -> tuple[Any, Any, Any]:
            gate, up = (np.einsum("mc,mrc->mr", x, w[experts]) for w in (self.gate, self.up))
            return gate, up, 1 / (1 + np.exp(-gate))

        def forward(x: Any) -> Any:
            gate, up, share = middle(np.array(x))
            return mx.array(np.einsum("mc,mrc->mr", gate * share * up, self.down[experts]))

        def backward(x: Any, dy: Any, _: Any) -> Any:
            gate, up, share = middle(np.array(x))
            inner = np.einsum("mr,mrc->mc", np.array(dy), self.down[experts])
            slope = share + gate * share * (1 - share)
            dx = np.einsum("mr,mrc->mc", inner * up * slope, self.gate[experts])
            dx += np.einsum("mr,mrc->mc", inner * gate * share, self.up[experts])
            return mx.array(dx)

        return with_vjp(forward, backward)(x)


def test_experts_may_lie_elsewhere(files: Callable[[str], Path]) -> None:
    """Some layers' experts on the host, which computes while gradients are traced."""
    config = AdapterConfig(rank=2, targets=("q_proj", "o_proj", "gate_proj", "router"))
    taken = []

    def split(weights: Any, *_: Any) -> HostExperts | None:
        taken.append(weights.down.name)
        if len(taken) > 1:
            return None
        shapes = [reversed(t.shape) for t in (weights.gate, weights.up, weights.down)]
        return HostExperts(
            *(
                t.data.view(np.float32).reshape(*shape).copy()
                for t, shape in zip((weights.gate, weights.up, weights.down), shapes, strict=True)
            )
        )

    resident, divided = (
        open_model(files("v2-lite"), config, split=which) for which in (None, split)
    )
    assert taken == ["blk.1.ffn_down_exps.weight", "blk.2.ffn_down_exps.weight"]
    batch = one_batch(14)
    (loss, _, _), gradient = resident.value_and_grad(shifted(resident), batch)
    (same, _, _), found = divided.value_and_grad(shifted(divided), batch)
    assert float(same) == pytest.approx(float(loss), rel=1e-5)
    assert difference(found, gradient) < 1e-4


# ---- mistakes ----


def test_targets_that_the_model_lacks(files: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="has none of q_a_proj, k_proj"):
        open_model(files("v2-lite"), AdapterConfig(targets=("q_a_proj", "k_proj")))


def test_parameters_of_another_model(files: Callable[[str], Path]) -> None:
    model = open_model(files("v2-lite"), AdapterConfig(targets=("o_proj",)))
    p = model.init(1)
    del p["blk.1.attn_output"]
    with pytest.raises(ValueError, match=r"'blk\.1\.attn_output' is missing or has no adapter"):
        model.loss(p, one_batch(3))


def test_checkpointing_keeps_less(files: Callable[[str], Path]) -> None:
    """Of 27 layers, only what goes into each."""
    peaks = []
    for checkpointing in (False, True):
        model = open_model(files("moonlight"), AdapterConfig(rank=2), checkpointing=checkpointing)
        p = model.init(1)
        mx.eval(p)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        (loss, _, _), gradient = model.value_and_grad(p, one_batch(64))
        mx.eval(loss, gradient)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.4 * peaks[0]

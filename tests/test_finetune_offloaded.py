"""Training with experts in RAM or on disk: as if all of them lay on the device."""

from __future__ import annotations

import gc
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_golden import ggufs

from localds import models
from localds.finetune.config import EXPERTS, TARGETS, AdapterConfig
from localds.gguf import GGMLType, GGUFFile
from localds.memory.experts import ExpertStore
from localds.memory.placement import place
from localds.memory.plan import make_plan

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from test_finetune_model import difference, one_batch, open_model, shifted  # noqa: E402
from test_ops_mlx import random_blocks  # noqa: E402

from localds.finetune.model.adapter import Trained  # noqa: E402
from localds.finetune.model.offloaded_host import (  # noqa: E402
    ApartExperts,
    host_of,
    staged_bytes,
)
from localds.finetune.model.offloaded_layers import OffloadedLayers, offloaded_experts  # noqa: E402
from localds.finetune.model.offloaded_model import OffloadedModel  # noqa: E402
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.matrix import REPACKED_AT_ONCE  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


NAMES = ["v2-lite", "v3", "mixtral", "v3, fused gate_up"]
FROZEN_EXPERTS = tuple(target for target in TARGETS if target != EXPERTS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF files by name, each made once."""
    return ggufs(tmp_path_factory.mktemp("offloaded"))


class Opener:
    """Opens models with offloaded experts, and closes them."""

    def __init__(self, path: Path) -> None:
        self._gguf = GGUFFile.open(path)
        self.geometry = models.read_geometry(self._gguf)
        self._open: list[OffloadedLayers] = []

    def layers(self, slots: int, piece: int = 1, *, stored: bool = False) -> OffloadedLayers:
        routed = [t for t in self._gguf.tensors.values() if "_exps." in t.name]
        one = sum(t.nbytes for t in routed) // self.geometry.moe_layers // self.geometry.experts
        layers = offloaded_experts(
            self.geometry,
            PORTABLE,
            slots=[slots] * self.geometry.moe_layers,
            staging_bytes=2 * piece * one,  # the files hold float32
            store=self._store() if stored else None,
        )
        self._open.append(layers)
        return layers

    def model(self, config: AdapterConfig, layers: OffloadedLayers, **options: Any) -> Any:
        stream = mx.new_thread_unsafe_stream(mx.cpu)
        return OffloadedModel(self._gguf, config, PORTABLE, stream, layers, **options)

    def close(self) -> None:
        for layers in self._open:
            layers.close()
        self._gguf.close()

    def _store(self) -> ExpertStore:
        """With the least pool that does."""
        plan = make_plan(self._gguf, self.geometry, 96)
        placement = place(self._gguf, self.geometry, plan, None, pooled=True)
        return ExpertStore(self._gguf, self.geometry, placement)


@pytest.fixture
def opener(files: Callable[[str], Path]) -> Iterator[Callable[[str], Opener]]:
    opened: list[Opener] = []

    def make(name: str) -> Opener:
        opened.append(Opener(files(name)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


CASES: dict[str, dict[str, Any]] = {
    "no slots, one expert at a time": {"slots": 0, "piece": 1},
    "some slots": {"slots": 3, "piece": 2},
    "from a store": {"slots": 2, "piece": 3, "stored": True},
}
METHODS = [("lora", 0.0), ("dora", 0.2)]


@pytest.mark.parametrize(("method", "dropout"), METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_resident_experts(
    files: Callable[[str], Path],
    opener: Callable[[str], Opener],
    name: str,
    method: Any,
    dropout: float,
) -> None:
    """To rounding; and the same bits wherever the experts lie, on every target."""
    config = AdapterConfig(rank=2, method=method, dropout=dropout, targets=TARGETS)
    resident = open_model(files(name), config)
    p, batch, key = shifted(resident), one_batch(20, rows=2), mx.random.key(4)
    (loss, count, balance), gradient = resident.value_and_grad(p, batch, key)
    found: list[Any] = []
    one = opener(name)
    for case in CASES.values():
        model = one.model(config, one.layers(**case), checkpointing=len(found) != 1)
        found.append(model.value_and_grad(p, batch, key))
        mx.eval(found[-1][1])
    (same, counted, use), first = found[0]
    assert counted == count
    assert float(same) == pytest.approx(float(loss), rel=1e-6)
    assert float(use.loss) == pytest.approx(float(balance.loss), rel=1e-6)
    assert (np.array(use.loads) == np.array(balance.loads)).all()
    assert difference(first, gradient) < 1e-5
    for (again, _, _), other in found[1:]:
        assert float(again) == float(same)
        assert difference(other, first) == 0


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", NAMES[:3])
def test_experts_of_a_traced_model(
    files: Callable[[str], Path],
    opener: Callable[[str], Opener],
    name: str,
    checkpointing: bool,
) -> None:
    """They may be given to `TrainModel`, as what MLX differentiates: to the bit."""
    config = AdapterConfig(rank=2, targets=FROZEN_EXPERTS)
    resident = open_model(files(name), config)
    p, batch = shifted(resident), one_batch(20)
    (loss, _, _), gradient = resident.value_and_grad(p, batch)
    layers = opener(name).layers(slots=3, piece=2)
    model = open_model(files(name), config, split=layers, checkpointing=checkpointing)
    (same, _, _), found = model.value_and_grad(p, batch)
    assert float(same) == float(loss)
    assert difference(found, gradient) == 0


def test_a_traced_layer(opener: Callable[[str], Opener]) -> None:
    """What MLX differentiates has the gradients that are computed where it traces nothing."""
    config = AdapterConfig(rank=2, method="dora", dropout=0.3, targets=("experts",))
    one = opener("v2-lite")
    layers = one.layers(2, piece=2)
    model = one.model(config, layers)
    experts: Any = layers.layers[1]
    p = {name: values for name, values in shifted(model).items() if name.startswith("blk.2.")}
    random = np.random.default_rng(3)
    with mx.stream(model.stream):
        keys = mx.random.split(mx.random.key(1), len(model.adapters))
        ids = mx.array(np.sort(random.integers(0, 7, 30)).astype(np.uint32))
        x, dy = (mx.array(random.standard_normal((30, 64)).astype(np.float32)) for _ in "ab")

        def product(x: Any, p: Any) -> Any:
            return (experts.chosen(x * 1, ids, Trained(p, keys)) * dy).sum()

        _, (dx, slopes) = mx.value_and_grad(product, argnums=(0, 1))(x, p)
        found = experts.mixed_gradients(x, ids[:, None], mx.ones((30, 1)), dy, Trained(p, keys))
        mx.eval(dx, slopes)
    assert len(slopes) == 3
    assert difference(slopes, found.parameters) == 0
    assert (np.array(dx) == np.array(found.x)).all()
    assert not np.array(slopes["blk.2.ffn_up_exps"]["a"])[7].any()  # nobody chose it


def test_loss_is_differentiable(opener: Callable[[str], Opener]) -> None:
    """As the training loop does it; and `evaluate` and `logits` know these experts."""
    config = AdapterConfig(rank=2, targets=("o_proj", "experts"))
    one = opener("v2-lite")
    model = one.model(config, one.layers(2))
    p, batch = shifted(model), one_batch(12)
    (loss, count, balance), gradient = model.value_and_grad(p, batch)

    def half(p: Any) -> Any:
        loss, *others = model.loss(p, batch)
        return loss / 2, *others

    (same, counted, use), found = mx.value_and_grad(half)(p)
    assert counted == count
    assert float(same) == float(loss) / 2
    assert (np.array(use.loads) == np.array(balance.loads)).all()
    doubled = {n: {k: 2 * a for k, a in values.items()} for n, values in found.items()}
    assert difference(doubled, gradient) == 0
    assert float(model.evaluate(p, batch)[0]) == pytest.approx(
        float(loss - balance.loss * count), rel=1e-6
    )
    assert np.isfinite(np.array(model.logits(p, batch.ids[0]))).all()


def test_what_is_used_most_moves_into_slots(opener: Callable[[str], Opener]) -> None:
    """Between steps alone, and without a change in what is computed."""
    config = AdapterConfig(rank=2, targets=("o_proj",))
    one = opener("v3")
    layers = one.layers(slots=3)
    model = one.model(config, layers)
    p, batch = shifted(model), one_batch(40, rows=2)
    results = []
    for _ in range(3):
        results.append(model.value_and_grad(p, batch))
        mx.eval(results[-1][1])
        if len(results) == 1:
            assert all(layer.pieces.slots.experts == [0, 1, 2] for layer in layers.layers)
        layers.reselect()
    for layer in layers.layers:
        inside = np.zeros(len(layer.uses), np.bool_)
        inside[layer.pieces.slots.experts] = True
        assert layer.uses.sum() == 3 * 80 * 3
        assert layer.uses[inside].min() + 8 >= layer.uses[~inside].max()
    assert any(layer.pieces.slots.experts != [0, 1, 2] for layer in layers.layers)
    for (loss, _, _), gradient in results[1:]:
        assert float(loss) == float(results[0][0][0])
        assert difference(gradient, results[0][1]) == 0


def test_layers_may_differ(files: Callable[[str], Path], opener: Callable[[str], Opener]) -> None:
    """Of one layer all experts lie on the device."""
    config = AdapterConfig(rank=2, targets=TARGETS)
    resident = open_model(files("v2-lite"), config)
    p, batch = shifted(resident), one_batch(12)
    _, gradient = resident.value_and_grad(p, batch)
    one = opener("v2-lite")
    layers = offloaded_experts(one.geometry, PORTABLE, slots=[8, 2], staging_bytes=1 << 20)
    model = one.model(config, layers)
    assert len(layers.layers) == 1
    assert difference(model.value_and_grad(p, batch)[1], gradient) < 1e-5
    layers.close()


# ---- memory ----

EXPERT_COUNT, HIDDEN, WIDTH = 24, 256, 512


def synthetic(kind: GGMLType) -> Any:
    """A layer's experts of one type."""
    random = np.random.default_rng(1)

    def tensor(name: str, columns: int, rows: int) -> Any:
        if kind is GGMLType.F16:
            values = random.standard_normal((EXPERT_COUNT * rows, columns)) / 16
            data = values.astype(np.float16).view(np.uint8)
        else:
            data = random_blocks(kind, EXPERT_COUNT * rows, columns)
        shape = (columns, rows, EXPERT_COUNT)
        name = f"blk.1.ffn_{name}_exps.weight"
        return SimpleNamespace(
            name=name, type=kind, shape=shape, data=data.reshape(-1), nbytes=data.nbytes
        )

    gate, up = (tensor(name, HIDDEN, WIDTH) for name in ("gate", "up"))
    norm = SimpleNamespace(name="norm", shape=(HIDDEN,))
    down = tensor("down", WIDTH, HIDDEN)
    return SimpleNamespace(norm=norm, gate=gate, up=up, down=down, gate_up=None)


@pytest.mark.parametrize(("slots", "piece"), [(0, 1), (6, 2)])
@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q6_K])
def test_memory_stays_within_slots_and_staging(kind: GGMLType, slots: int, piece: int) -> None:
    weights = synthetic(kind)
    limit = mx.set_cache_limit(0)
    staging = piece * staged_bytes(host_of(weights, EXPERT_COUNT, None), PORTABLE)
    base = active()
    layers = OffloadedLayers(PORTABLE, slots=[slots], staging_bytes=staging)
    experts: Any = layers(weights, SimpleNamespace(n_experts=EXPERT_COUNT))  # type: ignore[arg-type]
    tokens, top_k = 12, 4
    random = np.random.default_rng(2)
    ids = np.stack([random.permutation(EXPERT_COUNT)[:top_k] for _ in range(tokens)])
    x, dy = (mx.array(random.standard_normal((tokens, HIDDEN)).astype(np.float32)) for _ in "ab")
    given = mx.array(ids.astype(np.uint32)), mx.ones((tokens, top_k))
    mx.eval(given)
    held = active()
    routed = (weights.gate, weights.up, weights.down)
    one = sum(PORTABLE.device_bytes(kind, t.nbytes // EXPERT_COUNT) for t in routed)
    assert held - base <= slots * one + x.nbytes + dy.nbytes + 4096
    rows = 4 * tokens * top_k * (HIDDEN + WIDTH)
    # What MLX's form is made from, see `REPACKED_AT_ONCE`.
    loading = 9 * min(piece * WIDTH * HIDDEN, REPACKED_AT_ONCE) if kind is GGMLType.Q8_0 else 0
    for run in (experts.mixed, partial(experts.mixed_gradients, dy=dy)):
        mx.reset_peak_memory()
        mx.eval(list(run(x, *given, trained=Trained({}))))
        assert mx.get_peak_memory() - held < staging + loading + 6 * rows
    del experts
    layers.close()
    mx.set_cache_limit(limit)


def test_a_step_keeps_no_experts(
    files: Callable[[str], Path], opener: Callable[[str], Opener]
) -> None:
    """Of 27 layers: besides the experts it needs no more than with all of them on the device."""
    config, one, batch = AdapterConfig(rank=2), opener("moonlight"), one_batch(64)
    limit = mx.set_cache_limit(0)
    held, peaks = [], []
    for make in (
        lambda: open_model(files("moonlight"), config),
        lambda: one.model(config, one.layers(0)),
    ):
        before = active()
        model = make()
        p = model.init(1)
        mx.eval(p)
        held.append(active() - before)
        mx.reset_peak_memory()
        (loss, _, _), gradient = model.value_and_grad(p, batch)
        mx.eval(loss, gradient)
        peaks.append(mx.get_peak_memory() - active())
        del model, p, loss, gradient
    mx.set_cache_limit(limit)
    assert held[1] < 0.6 * held[0]
    assert peaks[1] < peaks[0]


# ---- mistakes ----


@pytest.mark.parametrize("reads", [0, 5, 20])
def test_a_failing_disk(
    opener: Callable[[str], Opener], monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """Whether it fails forward or back, it is told, and the model goes on."""
    config = AdapterConfig(rank=2, targets=("o_proj", "experts"))
    one = opener("v2-lite")
    model = one.model(config, one.layers(0))
    p, batch = shifted(model), one_batch(12)
    (loss, _, _), _ = model.value_and_grad(p, batch)
    whole, left = ApartExperts.read, reads

    def failing(self: ApartExperts, ids: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("the disk fails")
        return whole(self, ids)

    computes: tuple[Callable[[], Any], ...] = (
        lambda: model.value_and_grad(p, batch),
        lambda: mx.value_and_grad(lambda p: model.loss(p, batch))(p),
    )
    for compute in computes:
        with monkeypatch.context() as patch:
            patch.setattr(ApartExperts, "read", failing)
            left = reads
            with pytest.raises(OSError, match="the disk fails"):
                compute()
        (again, _, _), gradient = compute()
        mx.eval(gradient)
        assert float(again) == float(loss)


def test_too_little_staging(opener: Callable[[str], Opener]) -> None:
    """One expert of 3 * 40 * 64 values, of which two have to fit."""
    one = opener("v3")
    layers = OffloadedLayers(PORTABLE, slots=[0, 0], staging_bytes=2 * 4 * 3 * 40 * 64 - 1)
    with pytest.raises(ValueError, match="staging_bytes is 61439; an expert needs 61440"):
        one.model(AdapterConfig(targets=("o_proj",)), layers)
    layers.close()


@pytest.mark.parametrize("slots", [[0], [0, 0, 0], [0, -1]])
def test_slots_of_another_model(opener: Callable[[str], Opener], slots: list[int]) -> None:
    with pytest.raises(ValueError, match=r"from 0 to 8 for each of the 2 layers with experts"):
        offloaded_experts(opener("v3").geometry, PORTABLE, slots=slots, staging_bytes=1 << 20)


def active() -> int:
    gc.collect()
    return int(mx.get_active_memory())

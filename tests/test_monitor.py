"""What the monitor tells: against recorded choices, a simulated pool and sizes done by hand."""

from __future__ import annotations

import mmap
import shutil
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from checkpoints import VARIANTS, golden_config, golden_shapes, make_weights, write_checkpoint
from derive_gguf import fused_gate_up
from expert_simulator import Engine, calls, replay
from offloading import load_offloaded

import localds
from convert import convert_checkpoint
from localds import models, monitor
from localds.gguf import GGUFFile
from localds.memory.placement import place
from localds.memory.plan import DEFAULT_CHUNK, make_plan
from localds.model import Model
from localds.routing_trace import Tracer
from localds.settings import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.routing_trace import Trace
    from localds.session import Session

IDS = [(7919 * i + 11) % 1024 for i in range(256)]
PROMPT = 200
BLOCKS, EXPERTS, TOP_K = (1, 2, 3, 4, 5), 16, 4
"""Of the model in the box."""


@pytest.fixture(autouse=True)
def no_usage() -> None:
    """Uses of other tests do not count."""
    shutil.rmtree(cache_folder() / "usage", ignore_errors=True)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant("mixtral", tmp_path_factory.mktemp("mixtral"))


def make_variant(name: str, folder: Path) -> Path:
    variant = VARIANTS[name]
    weights = make_weights(golden_shapes(name), variant.seed)
    write_checkpoint(folder / "checkpoint", golden_config(name), weights)
    path = folder / "model.gguf"
    convert_checkpoint(folder / "checkpoint", path, pre=variant.pre)
    return path


def load_pooled(path: Path) -> Model:
    """All experts in the pool."""
    gguf = GGUFFile.open(path)
    geometry = models.read_geometry(gguf)
    model = Model(gguf, place(gguf, geometry, make_plan(gguf, geometry, 256), None, pooled=True))
    model.offload.store.wait_warm()
    return model


def run(session: Session, ids: Sequence[int] = IDS) -> None:
    """A prompt, then one by one."""
    session.evaluate(ids[:PROMPT])
    for token in ids[PROMPT:]:
        session.evaluate([token])


def trace(model: Model, chunk: int, ids: Sequence[int] = IDS) -> Trace:
    """What the model chooses in `run`; its layers compute as they always do."""
    tracer = Tracer(model.decoder)
    session = model.session(chunk=chunk)
    session._decoder = tracer.decoder
    run(session, ids)
    return tracer.trace()


def count(trace: Trace) -> NDArray[np.int64]:
    """Choices [layers, experts]."""
    uses = np.zeros((trace.n_layers, trace.n_experts), np.int64)
    rows = np.repeat(trace.layers, trace.tokens)
    np.add.at(uses, (rows[:, None], trace.ids), 1)
    return uses


def activity(model: Model) -> monitor.ExpertActivity:
    found = monitor.read(model).experts
    assert found is not None
    return found


def tier(model: Model, name: str, session: Session | None = None) -> monitor.Tier:
    return {tier.name: tier for tier in monitor.memory_tiers(model, session)}[name]


# ---- uses ----


@pytest.mark.parametrize("chunk", [7, DEFAULT_CHUNK])
@pytest.mark.parametrize("slots", [None, 12, 40])
def test_uses_are_the_choices_of_prompt_and_reply(
    guide_path: Path, slots: int | None, chunk: int
) -> None:
    """Recorded with another model, whose layers lie in memory."""
    with localds.load(guide_path) as model:
        chosen = count(trace(model, chunk))
    with localds.load(guide_path) if slots is None else load_offloaded(guide_path, slots) as model:
        assert not activity(model).uses.any()
        run(model.session(chunk=chunk))
        seen = activity(model)
    assert seen.layers == BLOCKS
    assert seen.uses.dtype == np.uint64
    np.testing.assert_array_equal(seen.uses, chosen)
    assert (seen.uses.sum(axis=1) == len(IDS) * TOP_K).all()


def test_choices_that_nothing_is_computed_for_do_not_count(guide_path: Path) -> None:
    """Those of a tracer, and of the look ahead to the next layer."""
    with load_offloaded(guide_path, 20) as model:
        chosen = count(trace(model, DEFAULT_CHUNK))
        np.testing.assert_array_equal(activity(model).uses, chosen)
        assert model.offload.store.figures().early > 0


@pytest.mark.parametrize("pooled", [False, True])
def test_uses_of_mixtral(mixtral: Path, pooled: bool) -> None:
    ids = [token % 320 for token in IDS]
    with load_offloaded(mixtral, 6) if pooled else localds.load(mixtral) as model:
        chosen = count(trace(model, 64, ids))
        seen = activity(model)
    assert (seen.layers, seen.uses.shape) == ((0, 1, 2), (3, 6))
    np.testing.assert_array_equal(seen.uses, chosen)


def test_uses_of_all_sessions_add_up(guide_path: Path) -> None:
    with localds.load(guide_path) as model:
        run(model.session())
        once = activity(model).uses
        run(model.session())
        model.logits(IDS[:10])
        assert activity(model).uses.sum() == 2 * once.sum() + 10 * TOP_K * len(BLOCKS)
        assert (activity(model).uses >= 2 * once).all()


@pytest.mark.parametrize("name", ["v2-dense", "youtu"])
def test_a_model_without_experts(name: str, tmp_path: Path) -> None:
    with localds.load(make_variant(name, tmp_path)) as model:
        reading = monitor.read(model)
        assert reading.experts is None
        assert monitor.expert_activity(model) is None
        assert reading.figures == monitor.Figures(0, 0, 0, 0.0)
        names = [tier.name for tier in reading.tiers if tier.name != "process"]
        assert names == ["RAM: weights", "RAM: latent cache"]
        weights = sum(tensor.nbytes for tensor in model.gguf.tensors.values())
        assert reading.tiers[0] == monitor.Tier("RAM: weights", weights, weights)


# ---- what is in memory ----


@pytest.mark.parametrize("load", [localds.load, load_pooled])
def test_all_in_memory(guide_path: Path, load: type) -> None:
    with load(guide_path) as model:
        assert (model.offload is not None) == (load is load_pooled)
        assert activity(model).resident.shape == (len(BLOCKS), EXPERTS)
        assert activity(model).resident.all()
        run(model.session())
        assert activity(model).resident.all()
        assert tier(model, "disk").used_bytes == 0


@pytest.mark.parametrize("slots", [12, 30, 60])
def test_what_stays_is_what_the_simulator_keeps(guide_path: Path, slots: int) -> None:
    with load_offloaded(guide_path, slots) as model:
        model.offload.store.native.set_look_ahead(False)
        engine = Engine(model.placement.main, model.placement.window)
        engine.preload([(layer, expert) for expert in range(EXPERTS) for layer in range(5)])
        assert kept(model) == engine._main
        recorded = trace(model, DEFAULT_CHUNK)
        replay(engine, calls(recorded))
        assert kept(model) == engine._main | set(engine._window)
        last = {(4, int(expert)) for expert in recorded.ids[-1]}
        assert last <= kept(model)


def kept(model: Model) -> set[tuple[int, int]]:
    return {(int(layer), int(expert)) for layer, expert in np.argwhere(activity(model).resident)}


def test_never_more_than_there_are_slots(guide_path: Path) -> None:
    with load_offloaded(guide_path, 30) as model:
        session = model.session()
        for token in IDS[:60]:
            session.evaluate([token])
            assert 0 < activity(model).resident.sum() <= 30
        model.offload.store.native.resize(12)
        assert activity(model).resident.sum() <= 12


# ---- figures ----


def test_figures_are_totals_that_nobody_takes_away(guide_path: Path) -> None:
    with load_offloaded(guide_path, 20) as model:
        store = model.offload.store
        session = model.session()
        warm = monitor.figures(model)
        assert (warm.hits, warm.misses) == (0, 0)
        assert warm.read_bytes > 0
        store.take_figures()
        taken = []
        for start in range(0, 250, 50):
            session.evaluate(IDS[start : start + 50])
            before = monitor.figures(model)
            taken.append(store.take_figures())
            assert monitor.figures(model).hits == before.hits
        total = monitor.figures(model)
        assert total.hits == sum(part.hits for part in taken) > 0
        assert total.hits + total.misses == sum(part.uses for part in taken)
        assert total.misses > 0
        stalled = sum(part.stall_seconds for part in taken)
        assert total.stall_seconds == pytest.approx(stalled, abs=1e-9)
        assert total.read_bytes >= warm.read_bytes + sum(part.read_bytes for part in taken)


def test_no_store_no_figures(guide_path: Path) -> None:
    with localds.load(guide_path) as model:
        run(model.session())
        assert monitor.read(model).figures == monitor.Figures(0, 0, 0, 0.0)


# ---- tiers ----


@pytest.mark.parametrize("slots", [None, 12, 50])
def test_tiers_add_up_to_the_plan(guide_path: Path, slots: int | None) -> None:
    with localds.load(guide_path) if slots is None else load_offloaded(guide_path, slots) as model:
        session = model.session()
        tiers = monitor.memory_tiers(model, session)
        assert [tier.name for tier in tiers[:4]] == [
            "RAM: weights",
            "RAM: experts",
            "RAM: latent cache",
            "disk",
        ]
        in_ram = sum(tier.total_bytes for tier in tiers[:3])
        assert in_ram + model.placement.plan.runtime == model.placement.total
        assert all(tier.used_bytes <= tier.total_bytes for tier in tiers[:4])
        assert monitor.memory_tiers(model)[2].total_bytes == tiers[2].total_bytes


@pytest.mark.parametrize("form", ["guide", "mixtral", "fused"])
def test_disk_holds_the_experts_that_are_not_in_memory(
    guide_path: Path, mixtral: Path, tiny_model: Path, tmp_path: Path, form: str
) -> None:
    path = {"guide": guide_path, "mixtral": mixtral}.get(form)
    path = path or fused_gate_up(tiny_model, tmp_path / "fused.gguf")
    with GGUFFile.open(path) as gguf:
        sizes = {
            name: tensor.nbytes // tensor.shape[-1]
            for name, tensor in gguf.tensors.items()
            if "_exps." in name
        }
        routed = sum(gguf.tensors[name].nbytes for name in sizes)
    with load_offloaded(path, 9 if form != "guide" else 40) as model:
        reading = monitor.read(model)
        missing = 0
        for block, resident in zip(reading.experts.layers, reading.experts.resident, strict=True):
            one = sum(size for name, size in sizes.items() if name.startswith(f"blk.{block}."))
            missing += int((~resident).sum()) * one
        tiers = {tier.name: tier for tier in reading.tiers}
        assert tiers["disk"] == monitor.Tier("disk", missing, routed)
        assert 0 < missing < routed
        slot = model.placement.slot_bytes
        used = int(reading.experts.resident.sum()) * slot
        assert tiers["RAM: experts"] == monitor.Tier(
            "RAM: experts", used, model.placement.slots * slot
        )


def test_the_pool_that_others_took_memory_from(guide_path: Path) -> None:
    """As the watch of the machine's memory does it: behind the plan's back."""
    with load_offloaded(guide_path, 40) as model:
        model.offload.store.native.resize(15)
        pool = tier(model, "RAM: experts")
        assert pool.total_bytes == 15 * model.placement.slot_bytes
        assert pool.used_bytes <= pool.total_bytes


@pytest.mark.parametrize(
    ("name", "kind", "row"),
    [
        ("guide", "f16", 6 * 80 * 2),
        ("guide", "f32", 6 * 80 * 4),
        ("tiny", "q8_0", 3 * 64 // 32 * 34),
    ],
)
def test_the_latent_cache(
    guide_path: Path, tiny_model: Path, name: str, kind: str, row: int
) -> None:
    """Of 6 layers with rows of 80 values, or 3 with rows of 64."""
    with localds.load({"guide": guide_path, "tiny": tiny_model}[name]) as model:
        session = model.session(100, cache_type=kind)
        cache = "RAM: latent cache"
        assert tier(model, cache, session) == monitor.Tier(cache, 0, 100 * row)
        session.evaluate([1] * 30)
        assert tier(model, cache, session) == monitor.Tier(cache, 30 * row, 100 * row)
        session.truncate(5)
        assert tier(model, cache, session) == monitor.Tier(cache, 5 * row, 100 * row)
        assert tier(model, cache) == monitor.Tier(cache, 0, 100 * row)


def test_the_process_holds_what_it_uses(guide_path: Path, tmp_path: Path) -> None:
    nbytes = 64 << 20
    path = tmp_path / "file"
    path.write_bytes(bytes(nbytes))
    with localds.load(guide_path) as model:
        assert tier(model, "process").total_bytes == model.placement.budget
        before = tier(model, "process").used_bytes
        own = np.ones(nbytes, np.uint8)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            assert not np.frombuffer(pages, np.uint8).any()
            grown = tier(model, "process").used_bytes - before
        assert 1.9 * nbytes < grown < 2.3 * nbytes
        assert own.all()


# ---- another thread ----


@pytest.mark.parametrize("slots", [None, 20])
def test_readings_of_another_thread(guide_path: Path, slots: int | None) -> None:
    """They change no bit, only grow, and end at what was done."""

    def load() -> Model:
        return localds.load(guide_path) if slots is None else load_offloaded(guide_path, slots)

    with load() as model:
        quiet = decode(model.session())
        expected = activity(model).uses
    readings: list[monitor.Reading] = []
    with load() as model:
        session = model.session()
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                readings.append(monitor.read(model, session))
                time.sleep(0.0005)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            logits = decode(session)
        finally:
            stop.set()
            thread.join()
        readings.append(monitor.read(model, session))
    np.testing.assert_array_equal(logits.view(np.uint32), quiet.view(np.uint32))
    np.testing.assert_array_equal(readings[-1].experts.uses, expected)
    for earlier, later in pairwise(readings):
        assert (earlier.experts.uses <= later.experts.uses).all()
        assert earlier.figures.hits <= later.figures.hits
        assert earlier.figures.read_bytes <= later.figures.read_bytes
    between = [r for r in readings if 0 < r.experts.uses.sum() < expected.sum()]
    assert len(between) >= 3


def decode(session: Session) -> NDArray[np.float32]:
    """Logits of a prompt, then one by one."""
    parts = [session.evaluate(IDS[:PROMPT], all_logits=True)]
    parts += [session.evaluate([token]) for token in IDS[PROMPT:]]
    return np.concatenate(parts)

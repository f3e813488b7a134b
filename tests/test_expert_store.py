"""Experts on demand: the same bits whatever is in memory, and clear errors when the disk fails."""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from expert_simulator import Engine, calls, replay
from offloading import budget_for, load_offloaded

import localds
from localds import _native
from localds.memory.plan import BudgetError
from localds.routing_trace import Tracer
from localds.settings import cache_folder

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.model import Model

IDS = [(7919 * i + 11) % 1024 for i in range(256)]


def bits(logits: NDArray[np.float32]) -> NDArray[np.uint32]:
    return logits.view(np.uint32)


def run(model: Model, chunk: int) -> NDArray[np.float32]:
    """Logits of 256 tokens: a prompt of 200, then one by one."""
    session = model.session(256, chunk=chunk)
    parts = [session.evaluate(IDS[:200], all_logits=True)]
    parts += [session.evaluate([token]) for token in IDS[200:]]
    return np.concatenate(parts)


@pytest.fixture(autouse=True)
def no_usage() -> None:
    """Uses of other tests do not count."""
    shutil.rmtree(cache_folder() / "usage", ignore_errors=True)


@pytest.fixture(scope="module")
def resident(guide_path: Path) -> dict[int, NDArray[np.float32]]:
    with localds.load(guide_path) as model:
        assert model.offload is None
        return {chunk: run(model, chunk) for chunk in (7, 1024)}


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("slots", [12, 24, 40, 60])
def test_same_bits_as_resident(
    guide_path: Path, resident: dict[int, NDArray[np.float32]], slots: int, chunk: int
) -> None:
    with load_offloaded(guide_path, slots) as model:
        np.testing.assert_array_equal(bits(run(model, chunk)), bits(resident[chunk]))
        figures = model.offload.store.take_figures()
        assert (figures.read_bytes > 0) == (figures.uses > 0)


def test_same_bits_with_more_threads_and_without_looking_ahead(
    guide_path: Path, resident: dict[int, NDArray[np.float32]]
) -> None:
    threads = _native.threads()
    try:
        with load_offloaded(guide_path, 20) as model:
            _native.set_threads(5)
            model.offload.store.native.set_look_ahead(False)
            np.testing.assert_array_equal(bits(run(model, 1024)), bits(resident[1024]))
            assert model.offload.store.take_figures().wasted_bytes == 0
    finally:
        _native.set_threads(threads)


def test_same_bits_while_the_pool_changes(
    guide_path: Path, resident: dict[int, NDArray[np.float32]]
) -> None:
    with load_offloaded(guide_path, 60) as model:
        stop = threading.Event()

        def change() -> None:
            sizes = np.random.default_rng(0)
            while not stop.wait(0.001):
                model.offload.store.native.resize(int(sizes.integers(1, 90)))

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(3):
                np.testing.assert_array_equal(bits(run(model, 1024)), bits(resident[1024]))
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("slots", [12, 30, 60])
def test_hits_are_those_of_the_simulator(guide_path: Path, slots: int, look_ahead: bool) -> None:
    """Exactly, however fast the disk was and whatever was read ahead."""
    with load_offloaded(guide_path, slots) as model:
        store = model.offload.store
        store.native.set_look_ahead(look_ahead)
        main = model.placement.main
        order = np.arange(store.layers * store.experts).reshape(store.layers, -1).T.ravel()
        engine = Engine(main, model.placement.window)
        engine.preload([divmod(int(key), store.experts) for key in order])

        tracer = Tracer(model.decoder)
        session = model.session(2048)
        session._decoder = tracer.decoder
        store.take_figures()
        for _ in range(3):
            session.truncate(0)
            session.evaluate(IDS * 2)
            for token in IDS[:200]:
                session.evaluate([token])
        figures = store.take_figures()
        replay(engine, calls(tracer.trace()))
        assert (figures.uses, figures.hits) == (engine.uses, engine.hits)
        assert 0 < figures.hits < figures.uses


def test_a_file_cut_short_is_one_error_and_never_a_wrong_token(
    guide_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(guide_path, path)
    with load_offloaded(path, 12) as model:
        session = model.session(512)
        session.evaluate(IDS[:10])
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(OSError, match=r"layer \d+, expert \d+: the file was cut short"):
            session.evaluate(IDS[10:200])
        assert session.tokens == tuple(IDS[:10])


def test_a_file_written_to_is_an_error(guide_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(guide_path, path)
    with load_offloaded(path, 12) as model:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(path, ns=(1, 1))
        with pytest.raises(_native.ReadError, match="was changed while it was in use"):
            model.session(512).evaluate(IDS)


def test_a_file_that_is_replaced_goes_on_serving(
    guide_path: Path, tmp_path: Path, resident: dict[int, NDArray[np.float32]]
) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    shutil.copy(guide_path, path)
    other.write_bytes(b"another model")
    with load_offloaded(path, 24) as model:
        other.replace(path)
        np.testing.assert_array_equal(bits(run(model, 1024)), bits(resident[1024]))


def test_budget_at_run_time(guide_path: Path, resident: dict[int, NDArray[np.float32]]) -> None:
    with load_offloaded(guide_path, 60) as model:
        model.set_ram(budget_for(guide_path, 20))
        assert model.placement.slots == model.offload.store.native.slots == 20
        np.testing.assert_array_equal(bits(run(model, 1024)), bits(resident[1024]))
        with pytest.raises(BudgetError, match="at least"):
            model.set_ram("1MiB")
        assert model.placement.slots == model.offload.store.native.slots
        model.set_ram("64GiB")
        np.testing.assert_array_equal(bits(run(model, 7)), bits(resident[7]))


def test_uses_are_kept_for_the_next_run(guide_path: Path) -> None:
    with load_offloaded(guide_path, 30) as model:
        run(model, 1024)
        counts = model.offload.store.counts()
    assert counts.sum() == 256 * 4 * 5
    with load_offloaded(guide_path, 30) as model:
        np.testing.assert_array_equal(model.offload.store.counts(), counts)


def test_a_longer_context_takes_slots(guide_path: Path) -> None:
    budget = budget_for(guide_path, 20, 2048)
    with localds.load(guide_path, ram=budget, context=64) as model:
        assert model.placement.slots > 20
        model.session(2048)
        assert model.placement.slots == model.offload.store.native.slots == 20


def test_a_longer_context_than_the_budget_is_refused(guide_path: Path) -> None:
    with localds.load(guide_path) as model:
        total = model.placement.plan.total
    with (
        localds.load(guide_path, ram=total - 1_000_000, context=64) as model,
        pytest.raises(BudgetError, match="load the model again with this context"),
    ):
        model.session(2048)


def test_a_store_that_cannot_be() -> None:
    layers = [(0, [(0, 0, 10)])]
    sizes = {"experts": 1, "window": 1, "ahead": 1, "most": 2, "readers": 1}
    with pytest.raises(ValueError, match="1 slots do not hold"):
        _native.ExpertStore([], layers, slots=1, **sizes)
    with pytest.raises(_native.ReadError, match="/nothing/here: cannot be opened"):
        _native.ExpertStore(["/nothing/here"], layers, slots=2, **sizes)

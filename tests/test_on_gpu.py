"""`localds.load` on a GPU, in whose place MLX's CPU device stands."""

from __future__ import annotations

import json
import threading
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_golden import ggufs
from typer.testing import CliRunner

import localds
from localds import monitor
from localds.cli import app
from localds.memory.latents import ContextError
from localds.memory.placement import slot_bytes
from localds.memory.plan import BudgetError
from localds.memory.speeds import Speeds
from localds.ops import mlx_device
from localds.ops.mlx_device import GpuError

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from localds.model import Model

SPEEDS = Speeds(
    memory_bytes_per_second=20e9,
    multiply_adds_per_second=400e9,
    disk_bytes_per_second=2e9,
    upload_bytes_per_second=10e9,
    device_bytes_per_second=500e9,
    gpu="MLX's CPU device",
    measured=date(2026, 1, 1),
)
VARIANTS = ("v2-lite", "v3", "mixtral")
PROMPTS = ("abc def", "abc xyz", "abc def ghi jkl mno pqr")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU of MLX's CPU device, and no folders of the user's."""
    monkeypatch.setenv("LOCALDS_GPU", "cpu")
    monkeypatch.setattr("localds.on_gpu.speeds_for", lambda *_: SPEEDS)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return ggufs(tmp_path_factory.mktemp("models"))


def texts(model: Model, **options: Any) -> list[str]:
    """Greedy replies to prompts of which each begins like the one before."""
    session = model.session(96, cache_type="f32")
    return [
        "".join(map(str, session.generate(prompt, max_tokens=12, temperature=0, **options)))
        for prompt in PROMPTS
    ]


WAYS: dict[str, dict[str, Any]] = {
    "all on the GPU": {},
    "no experts on the GPU": {"cpu_moe": True},
    "none of the first layers' experts": {"n_cpu_moe": 2},
    "experts on disk": {"cpu_moe": True, "ram": "least"},
}


def load(path: Path, **options: Any) -> Model:
    if options.get("ram") == "least":
        options["ram"] = least_ram(path, options)
    return localds.load(path, "gpu", context=96, cache_type="f32", **options)


def least_ram(path: Path, options: dict[str, Any]) -> int:
    """The least bytes that a pool beside the GPU runs with."""
    with pytest.raises(BudgetError, match="give more with --ram"):
        localds.load(path, "gpu", context=96, **options | {"ram": 1})
    with localds.load(path, "gpu", context=96, **options | {"ram": "1GiB"}) as model:
        plan = model.placement.plan
        pool = 3 * model.geometry.experts_used * slot_bytes(model.gguf, model.geometry)
        return plan.total - plan.weights + pool


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_text_is_that_of_the_cpu(
    files: Callable[[str], Path], name: str, way: dict[str, Any]
) -> None:
    path = files(name)
    with localds.load(path, "cpu", context=96, cache_type="f32") as model:
        expected = texts(model)
    with load(path, **way) as model:
        assert model.on_gpu is not None
        assert (model.offload is not None) == ("ram" in way)
        assert texts(model) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_unified_memory(
    files: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is brought to the device, where all is computed."""
    path = files(name)
    with localds.load(path, "cpu", context=96, cache_type="f32") as model:
        expected = texts(model)
    monkeypatch.setenv("LOCALDS_GPU", "cpu-unified")
    with load(path, cpu_moe=True) as model:
        assert model.offload is not None
        assert texts(model) == expected


def test_logits_of_all_tokens(files: Callable[[str], Path]) -> None:
    ids = list(range(5, 45))
    with localds.load(files("v3"), "cpu") as model:
        expected = model.logits(ids)
    with load(files("v3"), cpu_moe=True) as model:
        logits = model.logits(ids)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_any_thread_may_compute(files: Callable[[str], Path]) -> None:
    """One loads, others chat, one after the other."""
    found: list[list[str]] = []
    with load(files("v2-lite")) as model:
        for _ in range(2):
            thread = threading.Thread(target=lambda: found.append(texts(model)))
            thread.start()
            thread.join()
        assert found == [texts(model)] * 2


def test_a_sampled_reply_is_the_same_for_the_same_seed(files: Callable[[str], Path]) -> None:
    with load(files("v2-lite")) as model:
        session = model.session(96)
        options = {"max_tokens": 20, "temperature": 1.0, "top_k": 20, "seed": 7}
        first, second = (
            "".join(map(str, session.generate("abc", **options)))  # type: ignore[arg-type]
            for _ in range(2)
        )
    assert first == second


def test_penalties_are_the_hosts(files: Callable[[str], Path]) -> None:
    """They go another way, and give what the CPU gives."""
    with localds.load(files("v2-lite"), "cpu", context=96, cache_type="f32") as model:
        expected = texts(model, repetition_penalty=1.5)
    with load(files("v2-lite")) as model:
        assert texts(model, repetition_penalty=1.5) == expected


def test_rows_are_kept_and_restored(files: Callable[[str], Path]) -> None:
    """By another session of the same kind; rows of the CPU's are others."""
    prompt = "abc def " * 9
    with load(files("v2-lite")) as model:
        first = model.session(96)
        expected = "".join(map(str, first.generate(prompt, max_tokens=9, temperature=0)))
        assert first.keep(model.kept_rows()) > 0
        second = model.session(96)
        restored = second.restore(prompt, model.kept_rows())
        assert restored >= 32
        text = "".join(map(str, second.generate(prompt, max_tokens=9, temperature=0)))
        assert text == expected
        assert second.stats.reused_tokens >= restored - 1
    with localds.load(files("v2-lite"), "cpu", context=96) as model:
        assert model.session(96).restore(prompt, model.kept_rows()) == 0


# ---- memory ----


def test_no_more_is_taken_than_is_planned(guide_path: Path) -> None:
    for options in ({}, {"cpu_moe": True}):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with localds.load(guide_path, "gpu", context=1024, chunk=256, **options) as model:
            session = model.session(1024, chunk=256)
            session.evaluate([5] * 900)
            session.evaluate([6])
            assert model.on_gpu is not None
            taken, planned = mx.get_peak_memory() - before, model.on_gpu.placement.total
        assert taken < planned
        del model, session


def test_experts_that_do_not_fit(guide_path: Path) -> None:
    """The budget leaves out some; all are counted, and those used most lie on the GPU."""
    with localds.load(guide_path, "gpu", cpu_moe=True, context=512, chunk=64) as model:
        assert model.on_gpu is not None
        vram = model.on_gpu.placement.total + (4 << 20)
    with localds.load(guide_path, "gpu", vram=vram, context=512, chunk=64) as model:
        assert model.on_gpu is not None
        placement = model.on_gpu.placement
        assert not placement.resident
        assert placement.total <= vram
        assert 0 < sum(placement.slots) < len(placement.slots) * placement.experts
        session = model.session(512, chunk=64)
        "".join(map(str, session.generate("Hello", max_tokens=40, temperature=0)))
        reading = monitor.read(model, session)
        assert reading.experts is not None
        assert reading.experts.resident.sum() == sum(placement.slots)
        used = model.geometry.experts_used
        assert (reading.experts.uses.sum(axis=1) >= used * 5).all()
        figures = reading.figures
        assert figures.hits > 0
        assert figures.misses > 0
        assert figures.hits + figures.misses == reading.experts.uses.sum()
        names = [tier.name for tier in reading.tiers]
        assert names[:3] == ["GPU: weights", "GPU: experts", "GPU: latent cache"]
        assert reading.tiers[2].used_bytes == session.length * (placement.cache // 512)
    # The next run begins with the experts that were used most.
    usage = reading.experts.uses
    with localds.load(guide_path, "gpu", vram=vram, context=512, chunk=64) as model:
        assert model.on_gpu is not None
        resident = model.on_gpu.resident()
    for uses, here in zip(usage, resident, strict=True):
        assert uses[here].sum() >= uses[~here].sum()


def test_a_longer_session_must_fit_beside_the_experts(guide_path: Path) -> None:
    with localds.load(guide_path, "gpu", context=256, chunk=64) as model:
        assert model.on_gpu is not None
        total = model.on_gpu.placement.total
    with localds.load(guide_path, "gpu", vram=total, context=256, chunk=64) as model:
        model.session(256, chunk=64)
        with pytest.raises(BudgetError, match="context of 2048 tokens"):
            model.session(2048, chunk=64)
        model.session(256, chunk=64).evaluate([5, 6, 7])


def small_gpu(nbytes: int) -> Callable[[], mlx_device.Gpu]:
    return lambda: mlx_device.Gpu("small GPU", "cpu", nbytes, nbytes, unified=False)


def test_a_gpu_that_is_too_small(guide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself the CPU computes, and says why; who asks for the GPU is refused."""
    monkeypatch.setattr("localds.on_gpu.find_gpu", small_gpu(600 << 20))
    with localds.load(guide_path) as model:
        assert model.on_gpu is None
        (note,) = model.notes
        assert "computing on the CPU" in note
        assert "small GPU" in note
    with pytest.raises(BudgetError, match="small GPU"):
        localds.load(guide_path, "gpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "device 'cuda' is unknown; choose auto, cpu, gpu"),
        ({"device": "cpu", "vram": "1GiB"}, "vram"),
        ({"device": "cpu", "n_cpu_moe": 2}, "n_cpu_moe keeps experts off the GPU"),
        ({"vram": "much"}, "size 'much'"),
        ({"vram": "9999TiB"}, "more than"),
        ({"n_cpu_moe": -1}, "at least 0"),
        ({"n_cpu_moe": 1, "cpu_moe": True}, "give one of them"),
    ],
)
def test_wrong_options(guide_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        localds.load(guide_path, **options)


def test_a_gpu_that_fails(guide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX raises is told as one error; by itself, the CPU takes over while loading."""
    with localds.load(guide_path, "gpu", context=64) as model:
        session = model.session(64)

        def fail(*_: Any) -> None:
            raise RuntimeError("[malloc] Unable to allocate 7 bytes")

        monkeypatch.setattr("mlx.core.async_eval", fail)
        with pytest.raises(GpuError, match=r"the GPU failed .*7 bytes.*--vram"):
            session.evaluate([5, 6, 7])
        assert session.length == 0
        monkeypatch.undo()
    monkeypatch.setattr("localds.ops.mlx.build.MlxOps", fail)
    monkeypatch.setenv("LOCALDS_GPU", "cpu")
    with pytest.raises(GpuError, match="7 bytes"):
        localds.load(guide_path, "gpu")
    with localds.load(guide_path) as model:
        assert model.on_gpu is None
        assert "7 bytes" in model.notes[0]


def test_too_long_a_context_is_refused_before_loading(guide_path: Path) -> None:
    with pytest.raises(ContextError, match="at most 2048"):
        localds.load(guide_path, "gpu", context=4096, on_progress=lambda *_: pytest.fail("loaded"))


def test_a_closed_model_says_so(guide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDS_GPU", "cpu-unified")
    with localds.load(guide_path, "gpu", cpu_moe=True, context=64) as model:
        session = model.session(64)
    with pytest.raises(ValueError, match="the model is closed"):
        session.evaluate([5, 6, 7])


# ---- commands ----


def test_chat_says_what_lies_where(guide_path: Path) -> None:
    words = ["chat", str(guide_path), "-p", "What is localds?", "-n", "20", "--temp", "0"]
    done = CliRunner().invoke(app, [*words, "--n-cpu-moe", "2", "--device", "gpu"])
    assert done.exit_code == 0, done.output
    on_cpu = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert done.stdout.split()[:3] == on_cpu.stdout.split()[:3]
    assert "GPU MLX's CPU device: trunk" in done.stderr
    assert "the others on the CPU" in done.stderr
    assert "GPU" not in on_cpu.stderr


@pytest.mark.parametrize("options", [[], ["--cpu-moe"]])
def test_bench(guide_path: Path, options: list[str]) -> None:
    words = ["bench", str(guide_path), "-p", "32", "-n", "4", "-r", "1"]
    done = CliRunner().invoke(app, [*words, *options, "--json"])
    assert done.exit_code == 0, done.output
    prompt, generated = json.loads(done.stdout)
    assert prompt["gpu"] == generated["gpu"] == "MLX's CPU device"
    assert prompt["limit_ts"] is None
    assert generated["limit_ts"] > generated["avg_ts"] > 0
    assert generated["gpu_gbs"] > 0
    assert generated["gpu_hit_rate"] == (0 if options else None)
    text = CliRunner().invoke(app, [*words, *options])
    assert "takes" in text.stdout
    assert ("0.0% of the experts used lay on the GPU" in text.stdout) == bool(options)

"""A run that is interrupted, resumed or killed has the losses of one that is not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from finetune_fakes import FakeBatches, FakeModel, HeldOut  # noqa: E402
from test_finetune_loop import (  # noqa: E402, F401
    interrupt_at,
    no_pictures,
    of,
    same,
    train,
)

from localds.finetune.loop import (  # noqa: E402
    Evaluated,
    Progress,
    Resumed,
    Saved,
    StepDone,
    TrainingError,
    TrainSettings,
)
from localds.finetune.loop.optimizer import SMALL  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.finetune.loop import Event

SETTINGS = TrainSettings(
    steps=12, learning_rate=0.05, accumulation=2, weight_decay=0.1, evaluate_every=4
)
PLAIN = replace(SETTINGS, evaluate_every=None)
LENGTHS = FakeBatches(lengths=(4, 4, 4, 4, 4, 6))
FIGURES = ("event", "step", "loss", "lr", "grad_norm", "counted", "perplexity", "best")


def figures(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on time and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in FIGURES if name in line} for line in lines]


def wide(optimizer: str) -> tuple[TrainSettings, FakeModel]:
    """A model with dropout; its A has 8 bits per moment where the optimizer has them."""
    model = FakeModel(rank=SMALL // 8, dropout=0.1)
    return replace(SETTINGS, optimizer=optimizer), model


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(
    "stops",
    [
        [(0, 1)],  # before anything is done
        [(3, 2)],  # at the end of a step, before an evaluation
        [(2, 1), (3, 1), (5, 1), (5, 2), (11, 2)],
    ],
)
def test_resumed_runs_are_bit_equal(tmp_path, optimizer, stops):
    settings, model = wide(optimizer)
    unbroken, _ = train(tmp_path / "a", settings, model, LENGTHS, HeldOut())
    broken, _ = train(tmp_path / "b", settings, model, LENGTHS, HeldOut(), interrupt_at(stops[0]))
    for stop in stops[1:]:
        assert broken.reason == "interrupted"
        broken, _ = train(
            tmp_path / "b", settings, model, LENGTHS, HeldOut(), interrupt_at(stop), resume=True
        )
    broken, events = train(tmp_path / "b", settings, model, LENGTHS, HeldOut(), resume=True)
    assert broken.reason == "finished" and isinstance(events[0], Resumed)
    assert figures(tmp_path / "b") == figures(tmp_path / "a")
    assert same(broken.params, unbroken.params)
    assert broken.counters.best == unbroken.counters.best
    assert broken.counters.tokens == unbroken.counters.tokens
    assert broken.best.read_bytes() == unbroken.best.read_bytes()


def test_eight_bit_moments_are_used_in_these_tests(tmp_path):
    settings, model = wide("adamw8bit")
    result, _ = train(tmp_path, replace(settings, steps=1, evaluate_every=None), model)
    tensors = mx.load(str(result.checkpoint))
    assert {name for name, array in tensors.items() if array.dtype == mx.uint8} == {
        f"moments/{name}/{leaf}/{part}"
        for name in ("blk.0.attn_q", "blk.1.attn_output")
        for leaf in "ab"
        for part in "mv"
    }


def crash_after(saves: int, steps: int) -> Callable[[Event], None]:
    """Raise, as a fault would, some steps after a number of checkpoints."""
    seen = {"saves": 0, "steps": 0}

    def on_event(event: Event) -> None:
        seen["saves"] += isinstance(event, Saved)
        seen["steps"] += isinstance(event, StepDone) and seen["saves"] >= saves
        if seen["steps"] > steps:
            raise RuntimeError("crashed")

    return on_event


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_crash_between_checkpoints_repeats_the_steps_since(tmp_path, steps):
    settings = replace(SETTINGS, checkpoint_every=3)
    train(tmp_path / "a", settings, batches=LENGTHS, held_out=HeldOut())
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path / "b", settings, None, LENGTHS, HeldOut(), on_event=crash_after(3, steps))
    assert figures(tmp_path / "b")[-1]["step"] == 7 + steps
    _, events = train(tmp_path / "b", settings, None, LENGTHS, HeldOut(), resume=True)
    assert events[0].step == 6 and of(StepDone, events)[0].step == 7
    assert figures(tmp_path / "b") == figures(tmp_path / "a")


def test_an_interrupted_evaluation_is_made_up_for(tmp_path):
    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and event.doing == "evaluation" and event.step == 8:
            raise KeyboardInterrupt

    train(tmp_path / "a", SETTINGS, held_out=HeldOut())
    result, events = train(tmp_path / "b", SETTINGS, held_out=HeldOut(), on_event=on_event)
    assert result.reason == "interrupted" and [e.step for e in of(Evaluated, events)] == [4]
    train(tmp_path / "b", SETTINGS, held_out=HeldOut(), resume=True)
    assert figures(tmp_path / "b") == figures(tmp_path / "a")


def test_an_evaluation_that_no_checkpoint_knows_is_logged_once(tmp_path):
    """It was made up for after an interruption, and the run crashed before the next checkpoint."""

    def crash(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 8:
            raise RuntimeError("crashed")

    train(tmp_path / "a", SETTINGS, held_out=HeldOut())
    train(tmp_path / "b", SETTINGS, held_out=HeldOut(), on_event=interrupt_at((7, 2)))
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path / "b", SETTINGS, held_out=HeldOut(), on_event=crash, resume=True)
    assert figures(tmp_path / "b")[-1]["event"] == "evaluated"
    train(tmp_path / "b", SETTINGS, held_out=HeldOut(), resume=True)
    assert figures(tmp_path / "b") == figures(tmp_path / "a")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first, _ = train(tmp_path, SETTINGS, held_out=HeldOut())
    before = figures(tmp_path)
    again, events = train(tmp_path, SETTINGS, held_out=HeldOut(), resume=True)
    assert again.reason == "finished" and same(again.params, first.params)
    assert not of(StepDone, events) and not of(Evaluated, events) and not of(Saved, events)
    assert figures(tmp_path) == before and again.counters == first.counters


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    settings = replace(SETTINGS, evaluate_every=1, patience=1, learning_rate=5.0)
    first, _ = train(tmp_path, settings, held_out=HeldOut())
    assert first.reason == "no improvement"
    again, events = train(tmp_path, settings, held_out=HeldOut(), resume=True)
    assert again.reason == "no improvement" and not of(StepDone, events)


def test_the_order_of_the_parameters_survives(tmp_path):
    first, _ = train(tmp_path, PLAIN, on_event=interrupt_at((3, 1)))
    again, _ = train(tmp_path, PLAIN, on_event=interrupt_at((5, 1)), resume=True)
    assert [(n, list(p)) for n, p in again.params.items()] == [
        (n, list(p)) for n, p in first.params.items()
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"learning_rate": 0.1}}, r"learning_rate \(was 0.05, is 0.1\) changed"),
        (
            {"settings": {"seed": 1, "accumulation": 3}},
            r"accumulation \(was 2, is 3\), seed \(was 0, is 1\)",
        ),
        ({"settings": {"steps": 13}}, r"steps \(was 12, is 13\)"),
        ({"batches": FakeBatches(fingerprint="other")}, "the training data changed"),
        ({"model": FakeModel(fingerprint="other")}, "the model or its adapters changed"),
        ({"held_out": HeldOut(fingerprint="other")}, "the held-out data changed"),
    ],
)
def test_a_run_begun_differently_is_not_resumed(tmp_path, changes, named):
    train(tmp_path, SETTINGS, held_out=HeldOut(), on_event=interrupt_at((3, 1)))
    settings = replace(SETTINGS, **changes.pop("settings", {}))
    given = {"held_out": HeldOut()} | changes
    with pytest.raises(TrainingError, match=rf"resume: .* was begun differently: .*{named}"):
        train(tmp_path, settings, **given, resume=True)


def test_other_epochs_of_the_same_length_are_another_run(tmp_path):
    settings = TrainSettings(epochs=1.0, learning_rate=0.05)
    train(tmp_path, settings, on_event=interrupt_at((3, 1)))
    with pytest.raises(TrainingError, match=r"the steps \(were 10, are 11\) changed"):
        train(tmp_path, settings, batches=FakeBatches(steps_per_epoch=11), resume=True)


def test_when_to_save_may_change(tmp_path):
    train(tmp_path, SETTINGS, held_out=HeldOut(), on_event=interrupt_at((3, 1)))
    settings = replace(SETTINGS, checkpoint_every=1, keep_checkpoints=5, evaluate_every=6)
    assert train(tmp_path, settings, held_out=HeldOut(), resume=True)[0].reason == "finished"


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="holds no checkpoint; begin without resume"):
        train(tmp_path, PLAIN, resume=True)


def test_what_a_killed_run_leaves_is_cleaned_up(tmp_path):
    train(tmp_path / "a", PLAIN)
    train(tmp_path / "b", PLAIN, on_event=interrupt_at((5, 1)))
    whole = (tmp_path / "b" / "step-00000005.safetensors").read_bytes()
    partial = tmp_path / "b" / "step-00000006.safetensors.part"
    partial.write_bytes(whole[: len(whole) // 2])
    with (tmp_path / "b" / "metrics.jsonl").open("a") as log:
        log.write('{"event": "step", "step": 6, "lo')
    _, events = train(tmp_path / "b", PLAIN, resume=True)
    assert events[0].step == 5 and not partial.exists()
    assert figures(tmp_path / "b") == figures(tmp_path / "a")


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:5], lambda _: b"x" * 99]
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    settings = replace(PLAIN, checkpoint_every=4)
    train(tmp_path, settings, on_event=interrupt_at((5, 1)))
    newest = tmp_path / "step-00000005.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(TrainingError, match=r"step-00000005.*cannot be read.*delete it to resume"):
        train(tmp_path, settings, resume=True)
    newest.unlink()
    assert train(tmp_path, settings, resume=True)[1][0].step == 4


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    settings = replace(PLAIN, checkpoint_every=2)
    save = mx.save_safetensors

    def full(stream: Any, tensors: Any, metadata: Any) -> None:
        if json.loads(metadata["localds"])["counters"]["step"] == 4:
            stream.write(b"some of it")
            raise OSError(28, "No space left on device")
        save(stream, tensors, metadata)

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(TrainingError, match="could not be written: No space left on device; free"):
        train(tmp_path, settings)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == [
        "metrics.jsonl",
        "step-00000000.safetensors",
        "step-00000002.safetensors",
    ]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
sys.modules["matplotlib.figure"] = None
import test_finetune_resume as tests
tests.run_to_be_killed(Path({folder!r}))
"""
KILLED_SETTINGS = replace(
    SETTINGS, steps=60, accumulation=1, checkpoint_every=1, evaluate_every=3, optimizer="adamw8bit"
)


def run_to_be_killed(folder: Path) -> None:
    """Train slowly enough to be killed, saving most of the time."""
    model = FakeModel(rank=4096, dropout=0.1)
    resume = bool(list(folder.glob("step-*.safetensors")))

    def on_event(event: Event) -> None:
        if isinstance(event, Resumed | StepDone):
            print(event.step, flush=True)

    train(folder, KILLED_SETTINGS, model, LENGTHS, HeldOut(), on_event, resume=resume)


def test_kill_9_at_any_moment_loses_at_most_the_interval(tmp_path):
    run_to_be_killed(tmp_path / "a")
    folder = tmp_path / "b"
    source = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    command = [sys.executable, "-P", "-c", source]
    moments = random.Random(5)
    reached = 0
    for _ in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            told = [int(process.stdout.readline()) for _ in range(moments.randint(1, 5))]
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
            told += map(int, process.stdout.read().split())
        assert reached == 0 or told[0] >= reached - 1, "more than the interval was lost"
        reached = told[-1]
        assert reached < KILLED_SETTINGS.steps, "it has to be killed before it is done"
    subprocess.run(command, check=True)
    assert figures(folder) == figures(tmp_path / "a")
    last = f"step-{KILLED_SETTINGS.steps:08}.safetensors"
    ours, theirs = (mx.load(str(tmp_path / run / last)) for run in "ab")
    assert all(np.array_equal(np.array(ours[name]), np.array(theirs[name])) for name in ours)


KILLED_WITHIN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
sys.modules["matplotlib.figure"] = None
import test_finetune_resume as tests
tests.run_to_be_killed_within(Path({folder!r}), {moment!r})
"""
WITHIN_SETTINGS = replace(SETTINGS, checkpoint_every=2, keep_checkpoints=1)


def run_to_be_killed_within(folder: Path, moment: str) -> None:
    """Train until the checkpoint at step 6, which comes after a better evaluation at step 4."""
    save, rename, unlink = mx.save_safetensors, Path.replace, Path.unlink

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_written(stream: Any, tensors: Any, metadata: Any) -> None:
        save(stream, tensors, metadata)
        if "000006" in stream.name:
            stream.truncate(stream.tell() // 2)
            die()

    def around_rename(self: Path, target: Path) -> None:
        at_6 = "step-00000006" in self.name
        if at_6 and moment == "before the rename":
            die()
        rename(self, target)
        if at_6 and moment == "after the rename":
            die()

    def while_pruning(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        if self.name == "step-00000004.safetensors":
            die()

    if moment == "half written":
        mx.save_safetensors = half_written
    elif moment == "while pruning":
        Path.unlink = while_pruning
    else:
        Path.replace = around_rename
    train(folder, WITHIN_SETTINGS, batches=LENGTHS, held_out=HeldOut())


@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        ("half written", 4),
        ("before the rename", 4),
        ("after the rename", 6),
        ("while pruning", 6),
    ],
)
def test_kill_9_within_the_writing_of_a_checkpoint(tmp_path, moment, newest):
    source = KILLED_WITHIN.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path / "b"), moment=moment
    )
    killed = subprocess.run([sys.executable, "-P", "-c", source], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert bool(list((tmp_path / "b").glob("*.part"))) == (newest == 4)
    train(tmp_path / "a", WITHIN_SETTINGS, batches=LENGTHS, held_out=HeldOut())
    result, events = train(tmp_path / "b", WITHIN_SETTINGS, None, LENGTHS, HeldOut(), resume=True)
    assert events[0].step == newest
    assert figures(tmp_path / "b") == figures(tmp_path / "a")
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in "ab"]
    assert names[0] == names[1] and result.best.exists()

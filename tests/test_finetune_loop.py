"""The training loop: steps, clipping, skipping, evaluation, interrupts, events and logs."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import types
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from finetune_fakes import FakeBatch, FakeBatches, FakeModel, HeldOut, make_batch  # noqa: E402

from localds.finetune.loop import (  # noqa: E402
    Evaluated,
    Note,
    Progress,
    Saved,
    Skipped,
    StepDone,
    Stopped,
    Trainer,
    TrainingError,
    TrainSettings,
    gradients,
    read_params,
)
from localds.finetune.loop.curves import smoothed  # noqa: E402
from localds.finetune.loop.evaluation import evaluate, perplexity  # noqa: E402
from localds.finetune.loop.optimizer import AdamW  # noqa: E402
from localds.finetune.loop.pace import Pace  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from localds.finetune.loop import Event, Result

PLAIN = TrainSettings(steps=6, learning_rate=0.05)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than a run here."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def train(
    folder: Path,
    settings: TrainSettings = PLAIN,
    model: Any = None,
    batches: Any = None,
    held_out: Any = None,
    on_event: Callable[[Event], None] = lambda event: None,  # noqa: ARG005
    resume: bool = False,
    **options: Any,
) -> tuple[Result, list[Event]]:
    events: list[Event] = []

    def tell(event: Event) -> None:
        events.append(event)
        on_event(event)

    trainer = Trainer(
        model or FakeModel(), batches or FakeBatches(), held_out, settings, folder, tell, **options
    )
    return trainer.run(resume), events


def of(kind: type, events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def same(first: Any, second: Any) -> bool:
    return all(
        np.array_equal(np.array(first[name][leaf]), np.array(second[name][leaf]))
        for name in first
        for leaf in first[name]
    )


def test_training_learns_the_map(tmp_path):
    settings = TrainSettings(steps=60, learning_rate=0.05)
    result, events = train(tmp_path, settings, FakeModel(rank=8), FakeBatches(8), HeldOut())
    steps = of(StepDone, events)
    assert steps[0].loss > 2.7 and steps[-1].loss < 0.5  # log(16) is 2.77
    assert of(Evaluated, events)[-1].loss < 0.5
    assert [step.step for step in steps] == list(range(1, 61))
    assert result.reason == "finished" and isinstance(events[-1], Stopped)
    assert result.counters.tokens == 60 * 8 * 5 == sum(step.tokens for step in steps)
    assert all(step.peak_memory > 0 and step.tokens_per_second > 0 for step in steps)
    assert steps[-1].seconds_left == 0 < steps[0].seconds_left


@dataclass
class Joined:
    """The micro-batches of each step as the rows of one batch."""

    micros: int
    fingerprint: str = "data"
    steps_per_epoch: int = 10
    parts: FakeBatches = field(default_factory=lambda: FakeBatches(2))

    def length_at(self, step: int) -> int:
        return self.parts.length_at(step)

    def batch(self, step: int, micro: int) -> FakeBatch:
        assert micro == 0
        batches = [self.parts.batch(step, part) for part in range(self.micros)]
        counts = {float(batch.weights.sum()) for batch in batches}
        assert len(counts) > 1, "uneven counts are what this is about"
        names = ("ids", "targets", "weights", "segments", "positions")
        return FakeBatch(*(np.concatenate([getattr(b, n) for b in batches]) for n in names))


def test_accumulation_equals_one_large_batch_with_uneven_counts(tmp_path):
    parts, part_events = train(tmp_path / "parts", replace(PLAIN, accumulation=4))
    whole, whole_events = train(tmp_path / "whole", PLAIN, batches=Joined(4))
    for name in whole.params:
        for leaf in whole.params[name]:
            np.testing.assert_allclose(
                np.array(parts.params[name][leaf]), np.array(whole.params[name][leaf]), atol=1e-5
            )
    for part, one in zip(of(StepDone, part_events), of(StepDone, whole_events), strict=True):
        assert part.loss == pytest.approx(one.loss, rel=1e-5)
        assert part.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (part.counted, part.tokens) == (one.counted, one.tokens)


def test_the_norm_and_the_loss_are_those_of_the_mean_over_tokens(tmp_path):
    _, events = train(tmp_path, replace(PLAIN, steps=1))
    model, batch = FakeModel(), FakeBatches().batch(0, 0)
    params = model.init(0)
    (loss, count, _), grads = mx.value_and_grad(lambda p: model.loss(p, batch))(params)
    flat = np.concatenate(
        [np.array(g, np.float64).ravel() for leaves in grads.values() for g in leaves.values()]
    )
    (step,) = of(StepDone, events)
    assert step.counted == int(batch.weights.sum()) == int(count)
    assert step.loss == pytest.approx(float(loss) / step.counted, rel=1e-6)
    assert step.grad_norm == pytest.approx(np.linalg.norm(flat) / step.counted, rel=1e-5)


def test_clipping_scales_all_gradients_by_one_factor(tmp_path, monkeypatch):
    seen: list[float] = []
    update = AdamW.update

    def spy(self: AdamW, params: Any, grads: Any, scale: float, rate: float) -> None:
        seen.append(scale * gradients.global_norm(grads))
        update(self, params, grads, scale, rate)

    monkeypatch.setattr(AdamW, "update", spy)
    _, free = train(tmp_path / "free", replace(PLAIN, clip=None))
    np.testing.assert_allclose(seen, [step.grad_norm for step in of(StepDone, free)])
    seen.clear()
    _, clipped = train(tmp_path / "clipped", replace(PLAIN, clip=0.5))
    norms = [step.grad_norm for step in of(StepDone, clipped)]
    assert min(norms) < 0.5 < max(norms)  # both cases occur
    np.testing.assert_allclose(seen, [min(norm, 0.5) for norm in norms], rtol=1e-4)


def test_the_learning_rate_follows_the_schedule(tmp_path):
    settings = replace(PLAIN, steps=10, warmup=0.2, schedule="linear", learning_rate=0.8)
    _, events = train(tmp_path, settings)
    expected = [0.8 / 3, 1.6 / 3, *(0.8 * left / 8 for left in range(8, 0, -1))]
    np.testing.assert_allclose([step.lr for step in of(StepDone, events)], expected)


def test_dropout_depends_on_seed_step_and_micro_batch_alone():
    keys = {
        tuple(np.array(gradients.dropout_key(*place)).tolist())
        for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0)]
    }
    assert len(keys) == 5
    again = gradients.dropout_key(0, 1, 0)
    assert mx.array_equal(again, gradients.dropout_key(0, 1, 0))


def test_dropout_works_in_training_and_not_in_evaluation(tmp_path):
    model = FakeModel(dropout=0.5)
    dropped, _ = train(tmp_path / "dropped", model=model)
    kept, _ = train(tmp_path / "kept")
    assert not same(dropped.params, kept.params)
    dry = evaluate(replace(model, dropout=0.0), kept.params, HeldOut())
    assert evaluate(model, kept.params, HeldOut()) == dry


def test_the_seed_decides_the_run(tmp_path):
    runs = [
        train(tmp_path / str(number), replace(PLAIN, seed=seed), FakeModel(dropout=0.2))[0].params
        for number, seed in enumerate((3, 3, 4))
    ]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def spoil(*calls: int) -> Callable[[int], float]:
    return lambda call: math.nan if call in calls else 1.0


def test_steps_that_are_not_finite_are_skipped_and_told(tmp_path):
    model = FakeModel(on_loss=spoil(2, 3))
    result, events = train(tmp_path, model=model)
    skipped = of(Skipped, events)
    assert [event.step for event in skipped] == [2, 3]
    assert all(event.reason == "the loss is nan" for event in skipped)
    assert [event.step for event in of(StepDone, events)] == [1, 4, 5, 6]
    assert result.counters.skipped == 2 and result.counters.step == 6
    assert all(np.isfinite(np.array(p)).all() for x in result.params.values() for p in x.values())
    log = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [line["event"] for line in log] == ["step", "skipped", "skipped", *["step"] * 3]
    assert log[1]["loss"] == "nan"


def test_a_skipped_step_changes_nothing(tmp_path):
    result, _ = train(tmp_path / "a", replace(PLAIN, steps=1), FakeModel(on_loss=spoil(1)))
    assert same(result.params, FakeModel().init(0))
    tensors, facts = __import__("localds.finetune.loop.checkpoints", fromlist=["read"]).read(
        result.checkpoint
    )
    assert facts["optimizer_steps"] == 0
    assert not [name for name in tensors if name.startswith("moments/")]


def test_infinite_gradients_of_a_finite_loss_are_skipped(tmp_path):
    class Steep(FakeModel):
        def loss(self, params: Any, batch: Any, dropout_key: Any = None) -> Any:
            loss, count, balance = super().loss(params, batch, dropout_key)
            root = mx.sqrt(mx.abs(params["blk.0.attn_q"]["b"]).sum())  # steep at 0, where b begins
            return loss + root, count, balance

    _, events = train(tmp_path, replace(PLAIN, steps=1), Steep())
    (skipped,) = of(Skipped, events)
    assert math.isfinite(skipped.loss) and skipped.reason.startswith("the norm of the gradients is")


def test_three_in_a_row_end_the_run_with_a_remedy(tmp_path):
    model = FakeModel(on_loss=spoil(1, 2, 4, 5, 6))
    with pytest.raises(
        TrainingError, match=r"3 steps in a row.*step 6 the loss is nan.*below 0.05"
    ):
        train(tmp_path, replace(PLAIN, steps=20), model)
    assert model.calls == 6


def test_a_step_without_counted_tokens_is_skipped(tmp_path):
    class Uncounted(FakeBatches):
        def batch(self, step: int, micro: int) -> FakeBatch:
            batch = super().batch(step, micro)
            return batch if step == 5 else replace(batch, weights=0 * batch.weights)

    _, events = train(tmp_path, batches=Uncounted())
    assert [event.reason for event in of(Skipped, events)] == ["no token of the batch counts"] * 5
    assert len(of(StepDone, events)) == 1


def test_evaluation_is_the_loss_per_token(tmp_path):
    result, events = train(tmp_path, replace(PLAIN, evaluate_every=4), held_out=HeldOut())
    assert [event.step for event in of(Evaluated, events)] == [4, 6]
    last, total, count = of(Evaluated, events)[-1], 0.0, 0
    for index in range(2):
        batch = HeldOut()[index]
        total += float(FakeModel().loss(result.params, batch)[0])
        count += int(batch.weights.sum())
    assert last.counted == count and last.loss == pytest.approx(total / count, rel=1e-6)
    assert last.perplexity == pytest.approx(math.exp(last.loss))
    assert perplexity(1e4) == math.inf


class Worsening(FakeModel):
    """Its held-out loss is 10 minus a list of gains, in the order of the evaluations."""

    gains: tuple[float, ...] = (0, 3, 2, 1, 4, 0, 0, 0, 0)

    def evaluate(self, params: Any, batch: Any) -> Any:
        self.seen = getattr(self, "seen", -1) + 1
        _, count, balance = super().evaluate(params, batch)
        return count * (10 - self.gains[self.seen]), count, balance


@pytest.mark.parametrize(("patience", "stops", "best"), [(1, 3, 2), (2, 4, 2), (3, 8, 5)])
def test_early_stopping_by_patience(tmp_path, patience, stops, best):
    settings = replace(PLAIN, steps=9, evaluate_every=1, patience=patience)
    seen = {}

    class Keeping(Worsening):
        def evaluate(self, params: Any, batch: Any) -> Any:
            evaluated = super().evaluate(params, batch)
            seen[self.seen + 1] = {name: dict(leaves) for name, leaves in params.items()}
            return evaluated

    result, events = train(tmp_path, settings, Keeping(), held_out=HeldOut(1))
    assert result.reason == "no improvement" == events[-1].reason
    assert result.counters.step == stops and result.counters.best.step == best
    assert of(Evaluated, events)[best - 1].best
    kept, _ = read_params(result.best)
    assert same(kept, seen[best]) and not same(kept, result.params)


def test_only_the_best_that_a_checkpoint_names_is_kept(tmp_path):
    settings = replace(PLAIN, steps=9, evaluate_every=1, checkpoint_every=1, keep_checkpoints=3)
    result, _ = train(tmp_path, settings, Worsening(), held_out=HeldOut(1))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "best-00000005.safetensors",
        *(f"step-{step:08}.safetensors" for step in (7, 8, 9)),
    ]
    assert result.best == tmp_path / "best-00000005.safetensors"
    assert result.checkpoint == tmp_path / "step-00000009.safetensors"


def test_held_out_data_without_counted_tokens_are_refused(tmp_path):
    class Nothing(HeldOut):
        def __getitem__(self, index: int) -> FakeBatch:
            batch = super().__getitem__(index)
            return replace(batch, weights=0 * batch.weights)

    with pytest.raises(TrainingError, match="no token of the held-out data counts"):
        train(tmp_path, held_out=Nothing())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate_every": 2}, "evaluate_every is 2 and there are no held-out data"),
        ({"patience": 2}, "patience is 2 and there are no held-out data"),
    ],
)
def test_evaluation_settings_need_held_out_data(tmp_path, settings, message):
    with pytest.raises(TrainingError, match=message):
        train(tmp_path / "run", replace(PLAIN, **settings))
    assert not (tmp_path / "run").exists()


def test_patience_needs_regular_evaluations(tmp_path):
    with pytest.raises(TrainingError, match="patience is 2 and the only evaluation"):
        train(tmp_path, replace(PLAIN, patience=2), held_out=HeldOut())


def interrupt_at(micro: tuple[int, int], times: int = 1) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and (event.step, event.done) == micro:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return on_event


def test_ctrl_c_saves_and_ends_cleanly(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    settings = replace(PLAIN, accumulation=3)
    result, events = train(tmp_path, settings, on_event=interrupt_at((2, 1)))
    assert result.reason == "interrupted" and result.counters.step == 2
    assert of(Saved, events)[-1].step == 2 and result.checkpoint.exists()
    assert [event.done for event in of(Progress, events)][-1] == 1  # no more batches were run
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_after_the_last_micro_batch_completes_the_step(tmp_path):
    settings = replace(PLAIN, accumulation=3)
    result, _ = train(tmp_path, settings, on_event=interrupt_at((2, 3)))
    assert result.counters.step == 3


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_event=interrupt_at((2, 1), times=2))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["step-00000000.safetensors"]
    assert signal.getsignal(signal.SIGINT) is before
    assert train(tmp_path, resume=True)[0].reason == "finished"  # the lock is free


def test_an_event_stops_a_run_in_another_thread(tmp_path):
    stop, results = threading.Event(), []

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            stop.set()

    def work() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            results.append(train(tmp_path, on_event=on_event, stop=stop)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert results[0].reason == "interrupted" and results[0].counters.step == 3


def test_a_keyboard_interrupt_from_the_model_saves_too(tmp_path):
    def interrupt(call: int) -> float:
        if call == 4:
            raise KeyboardInterrupt
        return 1.0

    result, _ = train(tmp_path, model=FakeModel(on_loss=interrupt))
    assert result.reason == "interrupted" and result.counters.step == 3


def test_checkpoints_by_steps(tmp_path):
    _, events = train(tmp_path, replace(PLAIN, checkpoint_every=2))
    assert [event.step for event in of(Saved, events)] == [0, 2, 4, 6]
    assert [path.name[5:13] for path in sorted(tmp_path.glob("step-*"))] == ["00000004", "00000006"]


def test_checkpoints_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("localds.finetune.loop.pace.time.monotonic", lambda: now[0])

    def on_event(event: Event) -> None:
        if isinstance(event, StepDone):
            now[0] += 25

    _, events = train(tmp_path, replace(PLAIN, checkpoint_minutes=1.0), on_event=on_event)
    assert [event.step for event in of(Saved, events)] == [0, 3, 6]


def test_the_time_left_follows_the_lengths(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("localds.finetune.loop.pace.time.monotonic", lambda: now[0])
    pace = Pace(FakeBatches(lengths=(10, 10, 40, 40, 40)), 5)
    pace.begin_step()
    now[0] = 3.0
    assert pace.end_step(10) == 3.0
    assert pace.seconds_left(1) == pytest.approx(0.3 * 130)


def test_mlx_keeps_no_buffers_between_stages_of_length(tmp_path, monkeypatch):
    cleared: list[int] = []
    batches = FakeBatches(lengths=(4, 4, 8, 8, 12, 12))
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    before: list[int] = []
    train(
        tmp_path,
        batches=batches,
        on_event=lambda event: before.append(len(cleared)) if isinstance(event, StepDone) else None,
    )
    assert before == [0, 0, 1, 1, 2, 2]


class BalancedModel(FakeModel):
    bias: Any = None

    def init(self, seed: int) -> Any:
        self.bias = mx.zeros(3)
        return super().init(seed)

    def after_step(self, balances: Any) -> dict[str, float]:
        self.bias = self.bias + mx.array([1.0, -1.0, len(balances)])
        return {"load": float(sum(balance["load"] for balance in balances)), "odd": math.inf}

    def state(self) -> dict[str, Any]:
        return {"bias": self.bias}

    def restore(self, state: dict[str, Any]) -> None:
        self.bias = state["bias"]


def test_a_balanced_model_is_corrected_saved_and_reported(tmp_path):
    settings = replace(PLAIN, accumulation=2)
    model = BalancedModel(on_loss=lambda call: math.nan if call == 3 else 1.0)
    result, events = train(tmp_path, settings, model, on_event=interrupt_at((4, 1)))
    steps = of(StepDone, events)
    assert [step.balance["load"] for step in steps] == [float(step.counted) for step in steps]
    assert read_params(result.checkpoint)[1]["bias"].tolist() == [3, -3, 6]  # one was skipped
    model = BalancedModel()
    train(tmp_path, settings, model, resume=True)
    assert model.bias.tolist() == [5, -5, 10]
    assert json.loads(result.metrics.read_text().splitlines()[0])["balance"]["odd"] == "inf"


def test_the_log_has_every_figure(tmp_path):
    settings = replace(PLAIN, evaluate_every=3)
    result, events = train(tmp_path, settings, held_out=HeldOut())
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("step", 1), ("step", 2), ("step", 3), ("evaluated", 3),
        ("step", 4), ("step", 5), ("step", 6), ("evaluated", 6),
    ]  # fmt: skip
    assert [line["loss"] for line in lines if line["event"] == "step"] == [
        step.loss for step in of(StepDone, events)
    ]
    assert lines[3]["perplexity"] == of(Evaluated, events)[0].perplexity


def test_the_loss_curve_is_drawn(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib.figure", reason="needs matplotlib, which draws the curve")
    result, events = train(tmp_path, replace(PLAIN, evaluate_every=3), held_out=HeldOut())
    assert result.curve == tmp_path / "loss.png"
    assert result.curve.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not of(Note, events)


def test_without_matplotlib_a_note_says_so(tmp_path):
    result, events = train(tmp_path)
    assert result.curve is None
    (note,) = of(Note, events)
    assert "pip install matplotlib" in note.text and "metrics.jsonl" in note.text


def test_smoothing_neither_lags_nor_bends_a_line():
    line = [float(step) for step in range(300)]
    np.testing.assert_allclose(smoothed(line), line)
    assert smoothed([1.0, 5.0]) == [1.0, 5.0] and smoothed([]) == []
    spike = smoothed([0.0] * 50 + [51.0] + [0.0] * 50)
    np.testing.assert_allclose(spike, [51 / 11 if 45 <= at <= 55 else 0 for at in range(101)])


def test_tensorboard_without_its_package_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TrainingError, match="pip install tensorboardX"):
        train(tmp_path / "run", replace(PLAIN, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_scalars(tmp_path, monkeypatch):
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    settings = replace(PLAIN, tensorboard=True, steps=2)
    _, events = train(tmp_path, settings, BalancedModel(), held_out=HeldOut())
    assert calls[0] == (str(tmp_path / "tensorboard"), 1) and calls[-1] == "closed"
    last = of(StepDone, events)[-1]
    assert ("train/loss", last.loss, 2) in calls and ("train/lr", last.lr, 2) in calls
    assert ("balance/load", last.balance["load"], 2) in calls
    assert ("evaluation/loss", of(Evaluated, events)[0].loss, 2) in calls


def test_tensorboardx_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX, which writes the files")
    train(tmp_path, replace(PLAIN, tensorboard=True))
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    train(tmp_path)
    with pytest.raises(TrainingError, match="holds a run already; resume it"):
        train(tmp_path)


def test_one_process_trains_in_a_folder(tmp_path):
    def on_event(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            with pytest.raises(TrainingError, match="another process trains in it"):
                train(tmp_path, resume=True)

    assert train(tmp_path, on_event=on_event)[0].reason == "finished"


def test_batches_of_the_fakes_have_padding_and_uncounted_tokens():
    batch = make_batch((0,), 4, 6)
    assert (batch.segments == 0).any() and 0 < batch.weights.sum() < 20

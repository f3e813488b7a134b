"""The training loop: steps, evaluations and checkpoints, from wherever a state is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from localds.finetune.loop import checkpoints
from localds.finetune.loop.errors import TrainingError
from localds.finetune.loop.evaluation import evaluate, perplexity
from localds.finetune.loop.events import Evaluated, Progress, Saved, Skipped, StepDone
from localds.finetune.loop.gradients import clipping_scale, step_gradients
from localds.finetune.loop.pace import Pace
from localds.finetune.loop.protocols import Balanced
from localds.finetune.loop.schedule import Schedule
from localds.finetune.loop.state import Best, pack, pack_params

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from localds.finetune.loop.events import Event, Reason
    from localds.finetune.loop.gradients import StepGradients
    from localds.finetune.loop.interrupts import Interrupts
    from localds.finetune.loop.protocols import Batches, EvaluationBatches, Model
    from localds.finetune.loop.run_facts import RunFacts
    from localds.finetune.loop.state import RunState

_SKIPPED_IN_A_ROW = 3
"""So many steps that are not finite end the run."""


class Run:
    """Takes a state through the steps that are left, with its checkpoints in a folder."""

    def __init__(
        self,
        model: Model,
        batches: Batches,
        held_out: EvaluationBatches | None,
        facts: RunFacts,
        folder: Path,
        state: RunState,
        tell: Callable[[Event], None],
    ) -> None:
        self.model = model
        self.batches = batches
        self.held_out = held_out
        self.facts = facts
        self.settings = facts.settings
        self.steps = facts.steps
        self.folder = folder
        self.state = state
        self.counters = state.counters
        self.tell = tell
        self._schedule = Schedule(self.settings, self.steps)
        self._pace = Pace(batches, self.steps)
        self._saved_at = self._position() if self.checkpoint.exists() else None

    @property
    def checkpoint(self) -> Path:
        """The file of the checkpoint at this step."""
        return checkpoints.checkpoint_path(self.folder, self.counters.step)

    def train(self, interrupts: Interrupts) -> Reason:
        """Train until there is a reason to stop; a checkpoint of the state there is on the disk."""
        self._interrupts = interrupts
        self._save_if_changed()  # first of all, so that a run that began can be resumed
        reason = self._train()
        self._save_if_changed()
        return reason

    def _train(self) -> Reason:
        """An interrupt comes between batches, when a step is done wholly or not at all."""
        try:
            while True:
                self._interrupts.check()
                if self._evaluation_is_due():
                    self._evaluate()
                if self._has_no_improvement():
                    return "no improvement"
                if self.counters.step >= self.steps:
                    return "finished"
                if self._checkpoint_is_due():
                    self._save_if_changed()
                self._step()
        except KeyboardInterrupt:
            if self._interrupts.twice:
                raise
            return "interrupted"

    def _step(self) -> None:
        step = self.counters.step
        length = self.batches.length_at(step)
        if step and length != self.batches.length_at(step - 1):
            mx.clear_cache()  # buffers of the old shapes would be kept beside the new ones
        mx.reset_peak_memory()
        self._pace.begin_step()
        sums = step_gradients(
            self.model,
            self.state.params,
            self.batches,
            step,
            self.settings.accumulation,
            self.settings.seed,
            lambda done: self._progress("step", done, self.settings.accumulation),
        )
        if sums.problem is None:
            self._take(sums, length)
        else:
            self._skip(sums, sums.problem, length)

    def _take(self, sums: StepGradients, length: int) -> None:
        rate = self._schedule.rate(self.counters.step)
        scale = clipping_scale(sums.norm, self.settings.clip) / sums.counted
        self.state.optimizer.update(self.state.params, sums.gradients, scale, rate)
        balance: dict[str, float] = {}
        if isinstance(self.model, Balanced):
            balance = self.model.after_step(sums.balances)
        seconds = self._pace.end_step(length)
        self.counters.step += 1
        self.counters.tokens += sums.tokens
        self.counters.seconds += seconds
        self.counters.loss = sums.loss
        self.counters.skipped_in_a_row = 0
        self.tell(
            StepDone(
                self.counters.step,
                self.steps,
                sums.loss,
                rate,
                sums.norm,
                sums.counted,
                sums.tokens,
                sums.tokens / seconds,
                mx.get_peak_memory(),
                balance,
                self._pace.seconds_left(self.counters.step),
            )
        )

    def _skip(self, sums: StepGradients, problem: str, length: int) -> None:
        self.counters.step += 1
        self.counters.seconds += self._pace.end_step(length)
        self.counters.skipped += 1
        self.counters.skipped_in_a_row += sums.counted > 0
        self.tell(Skipped(self.counters.step, problem, sums.loss, sums.norm))
        if self.counters.skipped_in_a_row >= _SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"training diverged: {_SKIPPED_IN_A_ROW} steps in a row were skipped; in step "
                f"{self.counters.step} {problem}; train again with a learning rate below "
                f"{self.settings.learning_rate:g}, or with a longer warmup"
            )

    def _evaluation_is_due(self) -> bool:
        step, every = self.counters.step, self.settings.evaluate_every
        if self.held_out is None or step == self.counters.evaluated_step:
            return False
        return step == self.steps or (every is not None and step > 0 and step % every == 0)

    def _evaluate(self) -> None:
        assert self.held_out is not None  # noqa: S101
        total = len(self.held_out)
        mx.clear_cache()
        loss, counted = evaluate(
            self.model,
            self.state.params,
            self.held_out,
            lambda done: self._progress("evaluation", done, total),
        )
        mx.clear_cache()
        best = self.counters.best is None or loss < self.counters.best.loss
        if best:
            self.counters.best = self._keep_as_best(loss)
        self.counters.without_improvement = 0 if best else self.counters.without_improvement + 1
        self.counters.evaluated_step = self.counters.step
        self.tell(Evaluated(self.counters.step, loss, perplexity(loss), counted, best))

    def _keep_as_best(self, loss: float) -> Best:
        step = self.counters.step
        path = checkpoints.best_path(self.folder, step)
        tensors = pack_params(self.state.params, self._model_state())
        checkpoints.write(path, tensors, {"step": step, "loss": loss})
        return Best(step, loss, path.name)

    def _has_no_improvement(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.counters.without_improvement >= patience

    def _checkpoint_is_due(self) -> bool:
        minutes, every = self.settings.checkpoint_minutes, self.settings.checkpoint_every
        by_time = minutes is not None and self._pace.since_save() >= 60 * minutes
        return by_time or (every is not None and self.counters.step % every == 0)

    def _save_if_changed(self) -> None:
        if self._saved_at == self._position():
            return
        facts = self.facts.to_json() | {
            "optimizer_steps": self.state.optimizer.steps,
            "counters": self.counters.to_json(),
        }
        path = self.checkpoint
        checkpoints.write(path, pack(self.state, self._model_state()), facts)
        checkpoints.prune(self.folder, self.settings.keep_checkpoints)
        self._saved_at = self._position()
        self._pace.saved()
        self.tell(Saved(self.counters.step, path))

    def _position(self) -> tuple[int, int | None]:
        return self.counters.step, self.counters.evaluated_step

    def _model_state(self) -> dict[str, mx.array]:
        return self.model.state() if isinstance(self.model, Balanced) else {}

    def _progress(self, doing: Literal["step", "evaluation"], done: int, total: int) -> None:
        self.tell(Progress(doing, self.counters.step, done, total))
        if done < total:
            self._interrupts.check()

"""Training within a folder: begun, resumed, and what comes of it."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from filelock import FileLock, Timeout

from localds.finetune.loop import checkpoints
from localds.finetune.loop.curves import draw_curve
from localds.finetune.loop.errors import TrainingError
from localds.finetune.loop.events import Event, Note, Reason, Resumed, Stopped
from localds.finetune.loop.interrupts import Interrupts
from localds.finetune.loop.metrics import MetricsLog
from localds.finetune.loop.optimizer import AdamW
from localds.finetune.loop.protocols import Balanced
from localds.finetune.loop.run import Run
from localds.finetune.loop.run_facts import RunFacts
from localds.finetune.loop.state import Counters, RunState, unpack_moments, unpack_params
from localds.finetune.loop.tensorboard import Board, find_tensorboardx

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from localds.finetune.loop.protocols import Batches, EvaluationBatches, Model, Params
    from localds.finetune.loop.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    params: Params
    """After the last step."""
    counters: Counters
    reason: Reason
    best: Path | None
    """The file with the parameters of the best evaluation: see `read_params`."""
    checkpoint: Path
    metrics: Path
    curve: Path | None
    """The picture of the losses; None where matplotlib is not installed."""


def read_params(path: Path) -> tuple[Params, dict[str, mx.array]]:
    """The parameters in a checkpoint or in a file of the best ones, and the model's own state.

    Raises `TrainingError` for a file that is neither or is damaged.
    """
    return unpack_params(checkpoints.read(path)[0])


class Trainer:
    """Trains a model's parameters within a folder, which holds one run.

    Arrays are computed on MLX's default stream: enter that of the model around `run`.
    `on_event` is called with every `Event`, in the thread that trains. `stop`, once it is set, ends
    the run as the first Ctrl-C does: after the batch at hand, with a checkpoint.
    """

    def __init__(
        self,
        model: Model,
        batches: Batches,
        evaluation_batches: EvaluationBatches | None,
        settings: TrainSettings,
        folder: Path,
        on_event: Callable[[Event], None] = lambda event: None,  # noqa: ARG005
        stop: threading.Event | None = None,
    ) -> None:
        """Raises `TrainingError` for settings that lack something: held-out data, a package."""
        _check_evaluation(settings, evaluation_batches)
        if settings.tensorboard:
            find_tensorboardx()
        self.model = model
        self.batches = batches
        self.held_out = evaluation_batches
        self.settings = settings
        self.folder = Path(folder)
        self.facts = RunFacts(
            settings,
            settings.total_steps(batches.steps_per_epoch),
            model.fingerprint,
            batches.fingerprint,
            evaluation_batches.fingerprint if evaluation_batches is not None else None,
        )
        self._on_event = on_event
        self._stop = stop

    def run(self, resume: bool = False) -> Result:
        """Train to the end, or until stopped; `resume` goes on from the newest checkpoint.

        Raises `TrainingError` where the folder holds a run and `resume` is False, or holds none or
        one begun differently and `resume` is True, where another process trains in it, where the
        disk refuses, and where the loss or the gradients are not finite three times in a row.
        A second Ctrl-C raises `KeyboardInterrupt`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                checkpoints.remove_partial(self.folder)
                return self._run(self._resumed() if resume else self._begun(), resume)
        except Timeout as error:
            raise TrainingError(
                f"{self.folder} is in use: another process trains in it; wait for it, or train "
                "into another folder"
            ) from error

    def _begun(self) -> RunState:
        if checkpoints.checkpoints(self.folder):
            raise TrainingError(
                f"{self.folder} holds a run already; resume it, or train into another folder"
            )
        return RunState(self.model.init(self.settings.seed), AdamW(self.settings))

    def _resumed(self) -> RunState:
        saved = checkpoints.checkpoints(self.folder)
        if not saved:
            raise TrainingError(f"resume: {self.folder} holds no checkpoint; begin without resume")
        tensors, facts = checkpoints.read(saved[-1])
        self.facts.check(facts, saved[-1])
        params, model_state = unpack_params(tensors)
        optimizer = AdamW(self.settings)
        optimizer.steps = facts["optimizer_steps"]
        unpack_moments(tensors, optimizer)
        if isinstance(self.model, Balanced):
            self.model.restore(model_state)
        return RunState(params, optimizer, Counters.from_json(facts["counters"]))

    def _run(self, state: RunState, resumed: bool) -> Result:
        counters = state.counters
        metrics = self.folder / "metrics.jsonl"
        with ExitStack() as stack:
            log = MetricsLog(metrics, counters.step, counters.evaluated_step)
            stack.enter_context(closing(log))
            board = None
            if self.settings.tensorboard:
                board = Board(self.folder / "tensorboard", counters.step)
                stack.enter_context(closing(board))

            def tell(event: Event) -> None:
                log.write(event)
                if board is not None:
                    board.write(event)
                self._on_event(event)

            interrupts = stack.enter_context(Interrupts(self._stop))
            run = Run(self.model, self.batches, self.held_out, self.facts, self.folder, state, tell)
            if resumed:
                tell(Resumed(counters.step, run.checkpoint))
            reason = run.train(interrupts)
            log.sync()
            curve = self._draw(metrics, tell)
            tell(Stopped(counters.step, reason))
        best = self.folder / counters.best.file if counters.best else None
        return Result(state.params, counters, reason, best, run.checkpoint, metrics, curve)

    def _draw(self, metrics: Path, tell: Callable[[Event], None]) -> Path | None:
        picture = self.folder / "loss.png"
        if draw_curve(metrics, picture):
            return picture
        tell(
            Note(
                "no loss curve was drawn: matplotlib is not installed (pip install matplotlib); "
                f"{metrics} has the figures"
            )
        )
        return None


def _check_evaluation(settings: TrainSettings, batches: EvaluationBatches | None) -> None:
    if batches is None:
        for name in ("evaluate_every", "patience"):
            if getattr(settings, name) is not None:
                raise TrainingError(
                    f"{name} is {getattr(settings, name)} and there are no held-out data; give "
                    "some, or leave it out"
                )
    if settings.patience is not None and settings.evaluate_every is None:
        raise TrainingError(
            f"patience is {settings.patience} and the only evaluation is the one at the end; give "
            "evaluate_every, or leave patience out"
        )

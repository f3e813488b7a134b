"""Fine-tuning from files to files: data, plan, training, adapter.

    job = prepare("v2-lite-chat", ["train.jsonl"], "my-adapter", Options())
    print(describe_plan(job.plan))
    finished = job.run()

`prepare` checks everything and loads no weights; `run` trains.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from localds import models
from localds.catalog.resolve import find_model
from localds.finetune.building import Build
from localds.finetune.data import Encoder, Stage
from localds.finetune.data.batch import padded
from localds.finetune.device import device_budget, find_device
from localds.finetune.loop import Trainer, TrainingError, read_params
from localds.finetune.loop.checkpoints import checkpoints
from localds.finetune.options import Options
from localds.finetune.plan import Wanted, plan_training
from localds.finetune.results import write_results
from localds.finetune.sources import load_all
from localds.finetune.steps import HeldOut, StepBatches
from localds.finetune.trainee import Trainee
from localds.fingerprint import fingerprint
from localds.gguf import GGUFFile
from localds.gguf.write import replaced
from localds.ops.mlx_device import open_gpu
from localds.template import template_for
from localds.tokenizer import Tokenizer

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from localds.finetune.data import Data, DataReport
    from localds.finetune.loop import Event, Params
    from localds.finetune.loop.events import Reason
    from localds.finetune.loop.trainer import Result
    from localds.finetune.plan import TrainPlan
    from localds.finetune.results import Written
    from localds.models.geometry import Geometry
    from localds.ops.mlx_device import Gpu

    Progress = Callable[[str, int, int], None]

TRAINING = "training"
"""The folder with checkpoints, metrics and the loss curve, in that of the adapter."""

_PLAN_FILE = "plan.json"
_EVALUATIONS = 5
"""How often held-out data are evaluated unless the user says when."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended. An interrupted one has written no adapter.

    `curve` is the picture of the losses, None where matplotlib is not installed. `step` is that of
    the parameters that were written: the ones with the lowest held-out loss, or the last.
    """

    reason: Reason
    step: int
    loss: float | None
    curve: Path | None
    metrics: Path
    written: Written | None


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is ready: `report` tells of the data, `plan` of memory, `steps` how long it is."""

    gguf: GGUFFile
    gpu: Gpu
    output: Path
    options: Options
    data: Data
    plan: TrainPlan
    batches: StepBatches
    held_out: HeldOut | None
    resume: bool

    @property
    def report(self) -> DataReport:
        """What became of the data."""
        return self.data.report

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.batches.steps

    def run(
        self,
        on_event: Callable[[Event], None] = lambda event: None,  # noqa: ARG005
        stop: threading.Event | None = None,
    ) -> Finished:
        """Load the weights, train, and write the adapter; see `Trainer.run` for what it raises."""
        folder = self.output / TRAINING
        folder.mkdir(parents=True, exist_ok=True)
        _keep_plan(folder / _PLAN_FILE, self.plan)
        backend, stream = open_gpu(self.gpu)
        with Build(self.gguf, self.options, self.plan, backend, stream) as model:
            trainee = Trainee(model, fingerprint(self.gguf), self.options.adapter)
            settings = _settings(self.options, self.plan, self.batches, self.held_out)
            trainer = Trainer(
                trainee, self.batches, self.held_out, settings, folder, on_event, stop
            )
            with mx.stream(stream):
                result = trainer.run(self.resume)
                return self._finish(result, trainee)

    def _finish(self, result: Result, trainee: Trainee) -> Finished:
        step, params = result.counters.step, result.params
        written = None
        if result.reason != "interrupted":
            best = result.counters.best
            if best is not None and best.step != step and result.best is not None:
                step = best.step
                params, state = read_params(result.best)
                trainee.restore(state)
            written = self._write(params, trainee)
        return Finished(
            result.reason, step, result.counters.loss, result.curve, result.metrics, written
        )

    def _write(self, params: Params, trainee: Trainee) -> Written:
        return write_results(
            self.output,
            self.gguf,
            self.options.adapter,
            params,
            trainee.biases,
            as_gguf=self.options.gguf,
        )


def prepare(
    model: str | Path,
    data: Sequence[str | Path],
    output: str | Path,
    options: Options | None = None,
    *,
    valid: str | Path | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> Job:
    """Check a run and plan it. `model` is a GGUF file or what `localds list` calls it.

    `data` and `valid` are files, folders or data sets of the hub; see `load_data`, also for
    `on_progress`. `output` is the folder to make; with `resume` it holds a run that goes on.

    Raises `DataError` for bad records, `BudgetError` for what does not fit in memory, `NoMlxError`
    and `NoGpuError` for a device that is not there, `TrainingError` for the folder, `ValueError`
    for options, and what opening a model raises.
    """
    options = options or Options()
    output = Path(output)
    gpu = find_device(options.device)
    _check_output(output, resume)
    gguf = GGUFFile.open(find_model(str(model)).path)
    geometry = models.read_geometry(gguf)
    _check_length(options, geometry)
    tokenizer = Tokenizer.from_gguf(gguf)
    encoder = Encoder(
        tokenizer,
        template_for(gguf, tokenizer),
        length=options.lengths[-1],
        train_on=options.train_on,
    )
    found = load_all(
        data,
        encoder,
        valid=valid,
        share=options.evaluation_share,
        seed=options.training.seed,
        on_progress=on_progress,
    )
    lengths = _needed_lengths(options, found)
    plan = _plan(gguf, geometry, gpu, options, lengths[-1], output if resume else None)
    stages = [Stage(length, plan.rows) for length in lengths]
    batches = StepBatches(
        found.train,
        stages,
        accumulation=plan.accumulation,
        seed=options.training.seed,
        packing=options.packing,
        epochs=options.training.epochs,
        steps=options.training.steps,
    )
    held_out = None
    if len(found.valid):
        held_out = HeldOut(found.valid, stages[-1], packing=options.packing)
    return Job(gguf, gpu, output, options, found, plan, batches, held_out, resume)


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output} is a file; give the name of a folder")
    training = output / TRAINING
    has_run = bool(checkpoints(training))
    if resume and not has_run:
        raise TrainingError(f"resume: {output} holds no run; begin without resume")
    if not resume and (has_run or (output / "adapter_config.json").exists()):
        raise TrainingError(
            f"{output} holds a run already; go on with it (--resume), or give another folder"
        )


def _check_length(options: Options, geometry: Geometry) -> None:
    if options.lengths[-1] > geometry.context_length:
        raise ValueError(
            f"length is {options.lengths[-1]}, and the model was made for "
            f"{geometry.context_length} tokens; choose a shorter one"
        )


def _needed_lengths(options: Options, data: Data) -> tuple[int, ...]:
    """The lengths of rows, the last no longer than what the data fill."""
    examples = [part for part in (data.train, data.valid) if len(part)]
    used = max(int(part.lengths.max()) for part in examples)
    if options.packing:
        used = max(used, *(part.tokens for part in examples))
    *earlier, last = options.lengths
    last = min(last, padded(used, last))
    return (*(length for length in earlier if length < last), last)


def _plan(
    gguf: GGUFFile,
    geometry: Geometry,
    gpu: Gpu,
    options: Options,
    length: int,
    resumed: Path | None,
) -> TrainPlan:
    wanted = Wanted(
        options.adapter,
        length,
        options.batch,
        options.training.optimizer,
        options.checkpointing,
    )
    if resumed is not None:
        wanted = replace(wanted, **_read_plan(resumed / TRAINING / _PLAN_FILE))
        rows = wanted.rows or 0
        if rows < 1 or options.batch % rows:
            raise TrainingError(
                f"resume: batch is {options.batch}, and the run was begun with {rows} rows at "
                "once; give the batch that was given then, or train into another folder"
            )
    budget = device_budget(gpu, options.vram, options.ram)
    backend, _ = open_gpu(gpu)
    return plan_training(gguf, geometry, gpu, budget, wanted, device_bytes=backend.device_bytes)


def _keep_plan(path: Path, plan: TrainPlan) -> None:
    """Remember what decides the losses, so that a resumed run computes the same."""
    facts = {"rows": plan.rows, "checkpointing": plan.checkpointing}
    with replaced(path) as stream:
        stream.write(json.dumps(facts).encode() + b"\n")


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {"rows": int(facts["rows"]), "checkpointing": bool(facts["checkpointing"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"resume: {path} cannot be read ({error}); train into another folder"
        ) from error


def _settings(
    options: Options, plan: TrainPlan, batches: StepBatches, held_out: HeldOut | None
) -> Any:
    training = options.training
    every = training.evaluate_every
    if every is None and held_out is not None:
        every = max(batches.steps // _EVALUATIONS, 1)
    return replace(
        training, steps=batches.steps, accumulation=plan.accumulation, evaluate_every=every
    )

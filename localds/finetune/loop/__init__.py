"""The training loop: optimizer, schedule, evaluation and checkpoints, for any model and data.

    trainer = Trainer(model, batches, held_out, TrainSettings(steps=100), folder, on_event)
    result = trainer.run()

`protocols` says what a model and its data are. A run is exact: with the same settings and seed, on
the same device, it has the same losses whether or not it was interrupted.
"""

from localds.finetune.loop.errors import TrainingError
from localds.finetune.loop.events import (
    Evaluated,
    Event,
    Note,
    Progress,
    Resumed,
    Saved,
    Skipped,
    StepDone,
    Stopped,
)
from localds.finetune.loop.protocols import (
    Balanced,
    Batch,
    Batches,
    EvaluationBatches,
    Model,
    Params,
)
from localds.finetune.loop.settings import TrainSettings
from localds.finetune.loop.trainer import Result, Trainer, read_params

__all__ = [
    "Balanced",
    "Batch",
    "Batches",
    "Evaluated",
    "EvaluationBatches",
    "Event",
    "Model",
    "Note",
    "Params",
    "Progress",
    "Result",
    "Resumed",
    "Saved",
    "Skipped",
    "StepDone",
    "Stopped",
    "TrainSettings",
    "Trainer",
    "TrainingError",
    "read_params",
]

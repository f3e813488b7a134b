"""The differentiable model: frozen quantized weights, and adapters that are trained."""

from localds.finetune.model.adapter import Adapter, Parameters, Trained
from localds.finetune.model.feed_forward import Experts
from localds.finetune.model.model import AUX_ALPHA, TrainModel
from localds.finetune.model.packing import Batch
from localds.finetune.model.routing import Balance, updated_biases

__all__ = [
    "AUX_ALPHA",
    "Adapter",
    "Balance",
    "Batch",
    "Experts",
    "Parameters",
    "TrainModel",
    "Trained",
    "updated_biases",
]

"""The loss on held-out data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.loop.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.finetune.loop.protocols import EvaluationBatches, Model, Params


def evaluate(
    model: Model,
    params: Params,
    batches: EvaluationBatches,
    after_batch: Callable[[int], None] = lambda done: None,  # noqa: ARG005
) -> tuple[float, int]:
    """The cross-entropy per counted token over all batches, and the tokens counted.

    Raises `TrainingError` where no token counts.
    """
    total, counted = 0.0, 0
    for index in range(len(batches)):
        loss_sum, count, _ = model.evaluate(params, batches[index])
        mx.eval(loss_sum, count)
        total += float(loss_sum)
        counted += int(count)
        after_batch(index + 1)
    if not counted:
        raise TrainingError(
            "evaluation: no token of the held-out data counts; hold out more examples, or none"
        )
    return total / counted, counted


def perplexity(loss: float) -> float:
    """Of a loss per token."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf

"""The loss and the gradients of one optimizer step, over all of its micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.finetune.loop.protocols import Batches, Model, Params


@dataclass(slots=True)
class StepGradients:
    """Sums over the micro-batches of a step."""

    gradients: Params
    loss_sum: float
    counted: int
    tokens: int
    balances: list[Any]
    norm: float
    """The global norm of the gradients per counted token."""

    @property
    def loss(self) -> float:
        """Per counted token."""
        return self.loss_sum / self.counted if self.counted else math.nan

    @property
    def problem(self) -> str | None:
        """Why the step can't be taken."""
        if not self.counted:
            return "no token of the batch counts"
        if not math.isfinite(self.loss_sum):
            return f"the loss is {self.loss_sum}"
        return None if math.isfinite(self.norm) else f"the norm of the gradients is {self.norm}"


def step_gradients(
    model: Model,
    params: Params,
    batches: Batches,
    step: int,
    micros: int,
    seed: int,
    after_micro: Callable[[int], None],
) -> StepGradients:
    """Run the micro-batches of a step, one at a time in memory; `after_micro` gets how many."""
    sums = StepGradients({}, 0.0, 0, 0, [], 0.0)
    for micro in range(micros):
        batch = batches.batch(step, micro)
        key = dropout_key(seed, step, micro)
        (loss_sum, counted, balance), gradients = model.value_and_grad(params, batch, key)
        if micro:
            gradients = tree_map(mx.add, sums.gradients, gradients)
        sums.gradients = gradients
        mx.eval(loss_sum, counted, gradients, arrays_in(balance))
        sums.loss_sum += float(loss_sum)
        sums.counted += int(counted)
        sums.tokens += int(np.count_nonzero(batch.segments))
        sums.balances.append(balance)
        after_micro(micro + 1)
    sums.norm = global_norm(sums.gradients) / max(1, sums.counted)
    return sums


def global_norm(gradients: Params) -> float:
    """The root of the sum of all squares."""
    leaves: Any = tree_flatten(gradients)
    squares = mx.stack([mx.square(leaf).sum() for _, leaf in leaves])
    return math.sqrt(np.array(squares).sum(dtype=np.float64))


def clipping_scale(norm: float, limit: float | None) -> float:
    """What gradients of a norm are multiplied by so that it stays below a limit."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def dropout_key(seed: int, step: int, micro: int) -> mx.array:
    """A key that depends on nothing but its arguments, so that a resumed run draws the same."""
    words = np.random.SeedSequence((seed, step, micro)).generate_state(1, np.uint64)
    return mx.random.key(int(words[0]))


def arrays_in(value: Any) -> list[mx.array]:
    """The arrays in containers and dataclasses."""
    if isinstance(value, mx.array):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [array for part in value for array in arrays_in(part)]
    return []

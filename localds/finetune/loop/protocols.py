"""What the training loop asks of a model and of its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Params: TypeAlias = dict[str, dict[str, mx.array]]
"""What is trained: by a tensor's name, then "a", "b" or "m"; float32."""


class Batch(Protocol):
    """Rows of tokens: every array is [rows, length]."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """The tokens."""

    @property
    def targets(self) -> NDArray[np.int32]:
        """The token that follows each; anything where the weight is 0."""

    @property
    def weights(self) -> NDArray[np.float32]:
        """1 where predicting the target counts, else 0."""

    @property
    def segments(self) -> NDArray[np.int32]:
        """0 for padding, else the number of the example in its row."""

    @property
    def positions(self) -> NDArray[np.int32]:
        """Positions within the example."""


class Batches(Protocol):
    """Training data in their order: the same arguments always give the same batch."""

    @property
    def fingerprint(self) -> str:
        """Differs where the data or their order do."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is seen once."""

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` of the optimizer step `step`, both counted from 0."""

    def length_at(self, step: int) -> int:
        """The length of the rows in a step."""


class EvaluationBatches(Protocol):
    """Held-out data."""

    @property
    def fingerprint(self) -> str:
        """Differs where the data or their order do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


class Model(Protocol):
    """A frozen model with trainable parameters."""

    @property
    def fingerprint(self) -> str:
        """Differs where the frozen weights, the adapters' kind or the arithmetic do."""

    def init(self, seed: int) -> Params:
        """The parameters before the first step."""

    def value_and_grad(
        self, params: Params, batch: Batch, dropout_key: mx.array | None, /
    ) -> tuple[tuple[mx.array, mx.array | float, Any], Params]:
        """The loss, the number of tokens counted, the router's balance; and the loss's gradient.

        The first is a sum over the counted tokens. The balance is anything; arrays in it, in
        dataclasses and containers too, are evaluated with the loss.
        """

    def evaluate(self, params: Params, batch: Batch, /) -> tuple[mx.array, mx.array | float, Any]:
        """The loss as cross-entropy alone, with nothing dropped out, and no gradient."""


@runtime_checkable
class Balanced(Protocol):
    """A model that keeps its router balanced by more than gradients, such as V3's bias."""

    def after_step(self, balances: Sequence[Any]) -> dict[str, float]:
        """Correct the router by the balances of a step's micro-batches; what to report of them."""

    def state(self) -> dict[str, mx.array]:
        """What `after_step` changes: kept in checkpoints."""

    def restore(self, state: dict[str, mx.array]) -> None:
        """Go back to a state."""

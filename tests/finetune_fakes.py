"""A tiny model and its data for the training loop: a next-token map learnt by two adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from localds.finetune.loop import Params

VOCABULARY, WIDTH = 16, 8


@dataclass(frozen=True)
class FakeBatch:
    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]


def make_batch(seed: Sequence[int], rows: int, length: int) -> FakeBatch:
    """Tokens followed by 3 t + 1; a random share counts, the last of each row is padding."""
    draw = np.random.default_rng(list(seed))
    ids = draw.integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    weights = (draw.random((rows, length)) < draw.random()).astype(np.float32)
    segments = np.ones((rows, length), np.int32)
    weights[:, 0], weights[:, -1], segments[:, -1] = 1, 0, 0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return FakeBatch(ids, (3 * ids + 1) % VOCABULARY, weights, segments, positions)


@dataclass
class FakeBatches:
    rows: int = 2
    lengths: tuple[int, ...] = (6,)
    """Of step 0, 1, ...; the last of all further steps."""
    fingerprint: str = "data"
    steps_per_epoch: int = 10

    def length_at(self, step: int) -> int:
        return self.lengths[min(step, len(self.lengths) - 1)]

    def batch(self, step: int, micro: int) -> FakeBatch:
        return make_batch((step, micro), self.rows, self.length_at(step))


@dataclass
class HeldOut:
    count: int = 2
    fingerprint: str = "held out"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> FakeBatch:
        return make_batch((99, index), 3, 5)


@dataclass
class FakeModel:
    """Two low-rank maps from frozen embeddings to logits, with dropout on their input."""

    rank: int = 2
    dropout: float = 0.0
    fingerprint: str = "model"
    on_loss: Callable[[int], float] = lambda call: 1.0  # noqa: ARG005
    """Called with the number of every loss; the loss is multiplied by what it returns."""
    calls: int = field(default=0)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(7)
        self.embedding = mx.array(draw.standard_normal((VOCABULARY, WIDTH)), mx.float32)

    def init(self, seed: int) -> Params:
        draw = np.random.default_rng(seed)
        return {
            "blk.1.attn_output": self._adapter(draw) | {"m": mx.ones(VOCABULARY)},
            "blk.0.attn_q": self._adapter(draw),
        }

    def _adapter(self, draw: np.random.Generator) -> dict[str, mx.array]:
        a = draw.uniform(-0.3, 0.3, (self.rank, WIDTH))
        return {"a": mx.array(a, mx.float32), "b": mx.zeros((VOCABULARY, self.rank))}

    def loss(
        self, params: Params, batch: Any, dropout_key: mx.array | None = None
    ) -> tuple[mx.array, mx.array, Any]:
        self.calls += 1
        hidden = self.embedding[mx.array(batch.ids)]
        if dropout_key is not None and self.dropout:
            kept = mx.random.bernoulli(1 - self.dropout, hidden.shape, key=dropout_key)
            hidden = hidden * kept / (1 - self.dropout)
        first, second = params["blk.0.attn_q"], params["blk.1.attn_output"]
        logits = hidden @ first["a"].T @ first["b"].T
        logits = logits + (hidden @ second["a"].T @ second["b"].T) * second["m"]
        targets = mx.array(batch.targets)[..., None]
        chosen = mx.take_along_axis(logits, targets, axis=-1)[..., 0]
        losses = (mx.logsumexp(logits, axis=-1) - chosen) * mx.array(batch.weights)
        balance = {"load": (losses > 0).sum()}
        return losses.sum() * self.on_loss(self.calls), mx.array(batch.weights).sum(), balance

    def value_and_grad(self, params: Params, batch: Any, dropout_key: mx.array | None) -> Any:
        return mx.value_and_grad(lambda params: self.loss(params, batch, dropout_key))(params)

    def evaluate(self, params: Params, batch: Any) -> tuple[mx.array, mx.array, Any]:
        return self.loss(params, batch)

"""The final norm and the output matrix: logits, and the loss without all logits at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.limits import LOGIT_BYTES
from localds.finetune.model.gradients import with_vjp
from localds.finetune.model.matrices import rows_of, times, transposed

if TYPE_CHECKING:
    from localds.ops.mlx.matrix import Matrix


@dataclass(frozen=True, slots=True)
class TrainHead:
    """The output matrix has no adapter, so that the loss has a gradient of its input alone."""

    norm: mx.array
    output: Matrix
    eps: float

    def logits(self, x: mx.array) -> mx.array:
        """All logits of x [n, hidden], float32 [n, vocabulary]; not differentiable."""
        return times(self.output, self._normalized(x))

    def loss(self, x: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        """The summed cross-entropy of x [n, hidden], differentiable in x.

        `targets` [n] are ids, `weights` float32 [n]. The gradient is computed with the loss, while
        the logits are there.
        """

        def compute(h: mx.array) -> tuple[mx.array, mx.array]:
            loss = mx.array(0.0)
            gradients: list[mx.array] = []
            for part in self._parts(len(h)):
                rows = mx.depends(h[part], gradients[-1]) if gradients else h[part]
                logits = times(self.output, rows)
                loss = loss + _cross_entropy(logits, targets[part], weights[part])
                dlogits = _gradient(logits, targets[part], weights[part])
                gradients.append(transposed(self.output, dlogits))
            return loss, mx.concatenate(gradients)

        def vjp(_: mx.array, cotangents: list[mx.array], results: list[mx.array]) -> mx.array:
            return cotangents[0] * results[1]

        return with_vjp(compute, vjp)(self._normalized(x))[0]

    def plain_loss(self, x: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        """The same loss, not differentiable and without the cost of a gradient."""
        h, loss = self._normalized(x), mx.array(0.0)
        for part in self._parts(len(h)):
            logits = times(self.output, mx.depends(h[part], loss))
            loss = loss + _cross_entropy(logits, targets[part], weights[part])
        return loss

    def _normalized(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.norm, self.eps)

    def _parts(self, n: int) -> list[slice]:
        step = max(LOGIT_BYTES // (4 * rows_of(self.output)), 1)
        return [slice(start, start + step) for start in range(0, n, step)]


def _cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    found = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return ((mx.logsumexp(logits, axis=-1) - found) * weights).sum()


def _gradient(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    shares = mx.softmax(logits, axis=-1)
    at = targets[:, None]
    mine = mx.take_along_axis(shares, at, axis=-1)
    return mx.put_along_axis(shares, at, mine - 1, axis=-1) * weights[:, None]

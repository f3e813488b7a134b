"""A model with adapters: its loss as a function of their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from localds import models
from localds.finetune.model.adapter import Trained
from localds.finetune.model.feed_forward import Forwarded, TrainFfn, TrainMoe
from localds.finetune.model.ops import TrainOps
from localds.finetune.model.packing import Packing
from localds.finetune.model.routing import Balance

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from localds.finetune.config import AdapterConfig
    from localds.finetune.model.adapter import Adapter, Parameters
    from localds.finetune.model.attention import TrainGqa, TrainMla
    from localds.finetune.model.head import TrainHead
    from localds.finetune.model.ops import Split
    from localds.finetune.model.packing import Batch
    from localds.gguf import GGUFFile
    from localds.models.decoder import Layer
    from localds.ops import Ops
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.ops import MlxEmbedding

    Loss = tuple[mx.array, float, Balance]

AUX_ALPHA = 0.001
"""What DeepSeek-V2's auxiliary loss is multiplied by, as in its config.json."""


class TrainModel:
    """The frozen model in `gguf` on the device of `stream`, and adapters as `config` says.

    With `checkpointing`, of each layer only the input is kept for the gradient. A `split` says
    where experts are that do not lie on the device. Models with softmax routers whose router or
    experts are trained get DeepSeek-V2's auxiliary loss, times `aux_alpha`.

    Raises `GGUFError` for what does not fit, `ValueError` if the model has none of the targets.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: AdapterConfig,
        backend: Backend,
        stream: mx.Stream,
        *,
        checkpointing: bool = True,
        split: Split | None = None,
        aux_alpha: float = AUX_ALPHA,
    ) -> None:
        self.stream = stream
        self._checkpointing = checkpointing
        self._aux_alpha = aux_alpha
        with mx.stream(stream):
            ops = TrainOps(config, backend, split)
            # Its layers take what training has in place of a cache.
            built = models.build(gguf, cast("Ops[Any]", ops))
            mx.clear_cache()  # what loading took apart
        if not ops.adapters:
            raise ValueError(
                f"targets: {gguf.path} has none of {', '.join(config.targets)}; choose others"
            )
        self.geometry = built.geometry
        self.adapters: tuple[Adapter, ...] = tuple(ops.adapters)
        self._embedding = cast("MlxEmbedding", built.embedding)
        self._layers = [TrainLayer(layer) for layer in built.layers]
        self._head = cast("TrainHead", built.head)

    def init(self, seed: int) -> Parameters:
        """Parameters with which the model computes as without adapters."""
        with mx.stream(self.stream):
            return {adapter.name: adapter.init(seed) for adapter in self.adapters}

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts, in the order of loads and biases."""
        return tuple(index for index, layer in enumerate(self._layers) if layer.moe)

    def biases(self) -> mx.array | None:
        """The file's biases on the choice of experts, float32 [layers with experts, experts].

        None if the model has none.
        """
        moes = [layer.moe for layer in self._layers if layer.moe]
        if all(moe.bias is None for moe in moes):
            return None
        with mx.stream(self.stream):
            zeros = mx.zeros(self.geometry.experts)
            return mx.stack([zeros if moe.bias is None else moe.bias for moe in moes])

    def value_and_grad(
        self,
        parameters: Parameters,
        batch: Batch,
        dropout_key: mx.array | None = None,
        biases: mx.array | None = None,
    ) -> tuple[Loss, Parameters]:
        """The result of `loss`, and its gradient; nothing is computed yet."""
        with mx.stream(self.stream):  # the gradient's graph is made after `loss` returns
            compute = mx.value_and_grad(self.loss)
            loss, gradient = compute(parameters, batch, dropout_key, biases)
        return loss, gradient

    def loss(
        self,
        parameters: Parameters,
        batch: Batch,
        dropout_key: mx.array | None = None,
        biases: mx.array | None = None,
    ) -> Loss:
        """What training makes small, the sum of the targets' weights, and the use of experts.

        The first is the summed cross-entropy, plus the auxiliary loss (`Balance.loss`) times the
        sum of weights, so that their quotient is mean cross-entropy plus auxiliary loss. Without a
        key nothing drops out. `biases` take the place of the file's.
        """
        with mx.stream(self.stream):
            x, balance = self._forward(parameters, batch, dropout_key, biases)
            counted = count_targets(batch)
            loss = self._head.loss(counted.states(x), counted.targets, counted.weights)
            count = counted.total
            return loss + balance.loss * count, count, balance

    def evaluate(
        self, parameters: Parameters, batch: Batch, biases: mx.array | None = None
    ) -> Loss:
        """As `loss`, but the first is the summed cross-entropy alone; not differentiable."""
        with mx.stream(self.stream):
            x, balance = self._forward(parameters, batch, None, biases)
            counted = count_targets(batch)
            loss = self._head.plain_loss(counted.states(x), counted.targets, counted.weights)
            return loss, counted.total, balance

    def logits(self, parameters: Parameters, ids: NDArray[np.int32]) -> mx.array:
        """Logits float32 [n, vocabulary] of one text `ids` [n]."""
        with mx.stream(self.stream):
            positions = mx.arange(len(ids))[None]
            packing = Packing(mx.ones_like(positions), positions)
            x, _ = self._run_layers(parameters, ids[None], packing, None, None)
            return self._head.logits(x[0])

    def _forward(
        self,
        parameters: Parameters,
        batch: Batch,
        dropout_key: mx.array | None,
        biases: mx.array | None,
    ) -> tuple[mx.array, Balance]:
        packing = Packing(mx.array(batch.segments), mx.array(batch.positions))
        keys = None
        if dropout_key is not None:
            keys = mx.random.split(dropout_key, len(self.adapters))
        return self._run_layers(parameters, batch.ids, packing, keys, biases)

    def _run_layers(
        self,
        parameters: Parameters,
        ids: NDArray[np.int32],
        packing: Packing,
        keys: mx.array | None,
        biases: mx.array | None,
    ) -> tuple[mx.array, Balance]:
        self._check(parameters)
        x = self._embedding(ids.reshape(-1)).reshape(*ids.shape, -1)
        loads: list[mx.array] = []
        balance = mx.array(0.0)
        for index, layer in enumerate(self._layers):
            layer.reserve(ids.shape[1])
            bias = biases[len(loads)] if biases is not None and layer.moe else None
            mine = {
                name: values
                for name, values in parameters.items()
                if name.startswith(f"blk.{index}.")
            }
            done = self._run(layer, x, mine, packing, keys, bias)
            x = done.x
            if done.loads is not None:
                loads.append(done.loads)
            if done.balance is not None:
                balance = balance + self._aux_alpha * done.balance
        experts = self.geometry.experts
        return x, Balance(mx.stack(loads) if loads else mx.zeros((0, experts)), balance)

    def _run(
        self,
        layer: TrainLayer,
        x: mx.array,
        parameters: Parameters,
        packing: Packing,
        keys: mx.array | None,
        bias: mx.array | None,
    ) -> Forwarded:
        def run(x: mx.array, parameters: Parameters) -> Forwarded:
            return layer(x, packing, Trained(parameters, keys), bias)

        checkpointed: Callable[[mx.array, Parameters], Forwarded] = mx.checkpoint(run)
        return Forwarded(*(checkpointed if self._checkpointing else run)(x, parameters))

    def _check(self, parameters: Parameters) -> None:
        """Raise `ValueError` unless the parameters are for these adapters."""
        names = {adapter.name for adapter in self.adapters}
        if parameters.keys() != names:
            wrong = sorted(parameters.keys() ^ names)
            raise ValueError(
                f"parameters: {wrong[0]!r} is missing or has no adapter in this model; "
                "take those of init, or an adapter that was trained with the same targets"
            )


class TrainLayer:
    """Attention, then feed-forward."""

    def __init__(self, built: Layer[Any]) -> None:
        self.attention = cast("TrainMla | TrainGqa", built.attention)
        self._feed_forward = cast("TrainFfn | TrainMoe", built.feed_forward)

    def __call__(
        self, x: mx.array, packing: Packing, trained: Trained, bias: mx.array | None
    ) -> Forwarded:
        """X after the layer, and what its experts were sent."""
        x = self.attention(x, packing, trained)
        return self._feed_forward(x, packing, trained, bias)

    @property
    def moe(self) -> TrainMoe | None:
        """The feed-forward, if it has experts."""
        return self._feed_forward if isinstance(self._feed_forward, TrainMoe) else None

    def reserve(self, length: int) -> None:
        """Prepare for positions up to `length`."""
        self.attention.turns.reserve(length)


@dataclass(frozen=True, slots=True)
class _Counted:
    """Where targets count in the flat batch, the targets, their weights, and the sum of these."""

    at: mx.array
    targets: mx.array
    weights: mx.array
    total: float

    def states(self, x: mx.array) -> mx.array:
        """The hidden states that predict them, of x [rows, length, hidden]."""
        return x.reshape(-1, x.shape[-1])[self.at]


def count_targets(batch: Batch) -> _Counted:
    """At least one place, so that a batch in which none counts has a gradient, of zeros."""
    weights = np.where(batch.segments > 0, batch.weights, 0).reshape(-1).astype(np.float32)
    at = np.flatnonzero(weights) if weights.any() else np.zeros(1, np.int64)
    # The target of a place that does not count may be anything.
    targets = np.where(weights[at] > 0, batch.targets.reshape(-1)[at], 0)
    return _Counted(
        mx.array(at.astype(np.uint32)),
        mx.array(targets),
        mx.array(weights[at]),
        float(weights.sum()),
    )

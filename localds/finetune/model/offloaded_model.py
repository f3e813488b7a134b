"""Training where experts do not all lie in device memory: the gradient is computed layer by layer.

While MLX traces a gradient it keeps all that it evaluates, and offloaded experts can't be computed
without evaluating. So no trace holds more than one layer, and none the experts themselves; these
come to the device twice, for the loss and for the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.model.adapter import Trained
from localds.finetune.model.gradients import with_vjp
from localds.finetune.model.model import AUX_ALPHA, TrainModel, count_targets
from localds.finetune.model.offloaded import OffloadedExperts, Untraced
from localds.finetune.model.offloaded_steps import DividedStep, WholeStep, like, listed
from localds.finetune.model.packing import Packing
from localds.finetune.model.routing import Balance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from localds.finetune.config import AdapterConfig
    from localds.finetune.model.adapter import Parameters
    from localds.finetune.model.offloaded_layers import OffloadedLayers
    from localds.finetune.model.offloaded_steps import Kept, Step
    from localds.finetune.model.packing import Batch
    from localds.gguf import GGUFFile
    from localds.ops.mlx.backend import Backend

    Loss = tuple[mx.array, float, Balance]


class OffloadedModel(TrainModel):
    """As `TrainModel`, with `experts` that do not all lie on the device.

    Of each layer its input is kept for the gradient; without `checkpointing`, what goes to its
    experts as well, so that its attention is computed once less. Methods wait for what they
    compute, and raise `ReadError` where the disk fails. Raises as `TrainModel` does.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: AdapterConfig,
        backend: Backend,
        stream: mx.Stream,
        experts: OffloadedLayers,
        *,
        checkpointing: bool = True,
        aux_alpha: float = AUX_ALPHA,
    ) -> None:
        super().__init__(
            gguf,
            config,
            backend,
            stream,
            checkpointing=checkpointing,
            split=experts,
            aux_alpha=aux_alpha,
        )
        self.experts = experts
        self._untraced = Untraced()

    def loss(
        self,
        parameters: Parameters,
        batch: Batch,
        dropout_key: mx.array | None = None,
        biases: mx.array | None = None,
    ) -> Loss:
        """As `TrainModel.loss`. The gradient is computed with it, for `mx.value_and_grad`."""
        counted = 0.0

        def compute(*flat: mx.array) -> list[mx.array]:
            nonlocal counted
            given = like(parameters, flat)
            (loss, counted, balance), slopes = self.value_and_grad(
                given, batch, dropout_key, biases
            )
            return [loss, balance.loads, balance.loss, *listed(slopes)]

        def vjp(_: object, cotangents: list[mx.array], results: list[mx.array]) -> list[mx.array]:
            return [cotangents[0] * slope for slope in results[3:]]

        with mx.stream(self.stream):
            function = with_vjp(lambda flat: self._untraced(compute, *flat), vjp)
            loss, loads, auxiliary, *_ = function(listed(parameters))
        return loss, counted, Balance(loads, auxiliary)

    def value_and_grad(
        self,
        parameters: Parameters,
        batch: Batch,
        dropout_key: mx.array | None = None,
        biases: mx.array | None = None,
    ) -> tuple[Loss, Parameters]:
        """The result of `loss`, and its gradient."""
        counted = count_targets(batch)
        with mx.stream(self.stream):
            packing = Packing(mx.array(batch.segments), mx.array(batch.positions))
            keys = None
            if dropout_key is not None:
                keys = mx.random.split(dropout_key, len(self.adapters))
            steps = self._steps(parameters, batch.ids, packing, keys, biases)
            kept: list[Kept] = []
            x, balance = self._through(steps, batch.ids, kept)

            def head(x: mx.array) -> mx.array:
                return self._head.loss(counted.states(x), counted.targets, counted.weights)

            loss, dx = mx.value_and_grad(head)(x)
            mx.eval(loss, dx)
            slopes = self._back(steps, kept, dx, mx.array(self._aux_alpha * counted.total))
            loss = loss + balance.loss * counted.total
            return (loss, counted.total, balance), {name: slopes[name] for name in parameters}

    def close(self) -> None:
        """End the threads."""
        self._untraced.close()
        self.experts.close()

    def _run_layers(
        self,
        parameters: Parameters,
        ids: NDArray[np.int32],
        packing: Packing,
        keys: mx.array | None,
        biases: mx.array | None,
    ) -> tuple[mx.array, Balance]:
        return self._through(self._steps(parameters, ids, packing, keys, biases), ids, None)

    def _through(
        self, steps: list[Step], ids: NDArray[np.int32], kept: list[Kept] | None
    ) -> tuple[mx.array, Balance]:
        """The last hidden states; what the gradient needs goes to `kept`."""
        x = self._embedding(ids.reshape(-1)).reshape(*ids.shape, -1)
        loads: list[mx.array] = []
        auxiliary = mx.array(0.0)
        for step in steps:
            done, of_step = step.forward(x)
            x = done.x
            if done.loads is not None:
                loads.append(done.loads)
            if done.balance is not None:
                auxiliary = auxiliary + self._aux_alpha * done.balance
            mx.eval(x, loads, auxiliary)
            if kept is not None:
                kept.append(of_step)
        experts = self.geometry.experts
        return x, Balance(mx.stack(loads) if loads else mx.zeros((0, experts)), auxiliary)

    def _steps(
        self,
        parameters: Parameters,
        ids: NDArray[np.int32],
        packing: Packing,
        keys: mx.array | None,
        biases: mx.array | None,
    ) -> list[Step]:
        self._check(parameters)
        steps: list[Step] = []
        moes = 0
        for index, layer in enumerate(self._layers):
            layer.reserve(ids.shape[1])
            prefix, moe, bias = f"blk.{index}.", layer.moe, None
            mine = {name: p for name, p in parameters.items() if name.startswith(prefix)}
            if moe is not None:
                bias, moes = None if biases is None else biases[moes], moes + 1
            rest = packing, Trained(mine, keys), bias
            if moe is not None and isinstance(moe.experts, OffloadedExperts):
                attention, keep = layer.attention, not self._checkpointing
                steps.append(DividedStep(attention, moe, moe.experts, keep, *rest))
            else:
                steps.append(WholeStep(layer, moe is not None and moe.balanced, *rest))
        return steps

    @staticmethod
    def _back(steps: list[Step], kept: list[Kept], dx: mx.array, dbalance: mx.array) -> Parameters:
        """The gradient of the parameters, from that of what the last step returned."""
        slopes: Parameters = {}
        first = min(i for i, step in enumerate(steps) if step.trained.parameters)
        for index in reversed(range(first, len(steps))):
            dx, mine = steps[index].gradients(kept.pop(), dx, dbalance)
            slopes |= mine
            mx.eval(mine, dx if index > first else [])
        return slopes

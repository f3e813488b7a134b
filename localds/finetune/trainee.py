"""The model as the training loop sees it: its fingerprint, and its router kept balanced."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from localds.finetune.config import EXPERTS, ROUTER
from localds.finetune.model import Balance, updated_biases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localds.finetune.config import AdapterConfig
    from localds.finetune.loop import Batch, Params
    from localds.finetune.model import TrainModel

    Loss = tuple[mx.array, float, Balance]

_BIASES = "router_biases"


class Trainee:
    """`Model` and `Balanced` of the loop, around a `TrainModel`.

    Where the router or the experts are trained, the biases of a model that chooses by some (V3)
    move against uneven loads after every step; `biases` are what they are now, by the names of
    their tensors. The balance is reported of every model with experts.
    """

    def __init__(self, model: TrainModel, weights: str, config: AdapterConfig) -> None:
        """`weights` tells the frozen weights from all others."""
        self.fingerprint = f"{weights} {astuple(config)!r}"
        self._model = model
        self._moves = ROUTER in config.targets or EXPERTS in config.targets
        self._biases = model.biases() if self._moves else None

    @property
    def biases(self) -> dict[str, mx.array]:
        """The biases that were moved, float32 [experts] of each layer; none where none are."""
        if self._biases is None:
            return {}
        layers = self._model.expert_layers
        return {f"blk.{layer}.exp_probs_b.bias": self._biases[i] for i, layer in enumerate(layers)}

    def init(self, seed: int) -> Params:
        """The parameters before the first step."""
        return self._model.init(seed)

    def value_and_grad(
        self, params: Params, batch: Batch, dropout_key: mx.array | None
    ) -> tuple[Loss, Params]:
        """See `TrainModel.value_and_grad`."""
        return self._model.value_and_grad(params, batch, dropout_key, self._biases)

    def evaluate(self, params: Params, batch: Batch) -> Loss:
        """See `TrainModel.evaluate`."""
        return self._model.evaluate(params, batch, self._biases)

    def after_step(self, balances: Sequence[Any]) -> dict[str, float]:
        """Move the biases, and say how uneven the busiest layer's loads are: 1 is even."""
        if not self._model.expert_layers:
            return {}
        loads = sum((balance.loads for balance in balances[1:]), balances[0].loads)
        if self._biases is not None:
            self._biases = updated_biases(self._biases, loads)
            mx.eval(self._biases)
        uneven = Balance(loads, balances[0].loss).unevenness()
        loss = sum(float(balance.loss) for balance in balances) / len(balances)
        report = {"unevenness": float(uneven.max())}
        return report | ({"loss": loss} if loss else {})

    def state(self) -> dict[str, mx.array]:
        """What `after_step` changes."""
        return {} if self._biases is None else {_BIASES: self._biases}

    def restore(self, state: dict[str, mx.array]) -> None:
        """Go back to a state."""
        if self._biases is not None:
            self._biases = state[_BIASES]

"""AdamW over the parameter tree, with moments in float32 or in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.optimizers import Adam

from localds.finetune.limits import SMALL
from localds.finetune.loop.dynamic_map import dequantize, quantize

if TYPE_CHECKING:
    from localds.finetune.loop.protocols import Params
    from localds.finetune.loop.settings import TrainSettings


Moments = dict[str, mx.array]
_DECAYED = ("a", "b")


class AdamW:
    """AdamW (arXiv:1711.05101) with bias correction.

    `moments` holds each parameter's "m" and "v", float32 in its shape; in 8 bits uint8 blocks of
    256 values, with "m_largest" and "v_largest" float32 [blocks]. They and `steps` are its state.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.steps = 0
        self.moments: dict[str, dict[str, Moments]] = {}
        self._quantized = settings.optimizer == "adamw8bit"
        self._decay = settings.weight_decay
        self._adam = Adam(
            settings.learning_rate,
            betas=[settings.beta1, settings.beta2],
            eps=settings.epsilon,
            bias_correction=True,
        )

    def update(self, params: Params, gradients: Params, scale: float, learning_rate: float) -> None:
        """One step in place, by the gradients times `scale`; `gradients` is emptied."""
        self.steps += 1
        self._adam.state["step"] = mx.array(self.steps, mx.uint64)
        self._adam.learning_rate = mx.array(learning_rate, mx.float32)
        for name, leaves in params.items():
            moments = self.moments.setdefault(name, {})
            for leaf in leaves:
                keep = 1 - learning_rate * self._decay if leaf in _DECAYED else 1.0
                gradient = gradients[name].pop(leaf) * scale
                leaves[leaf], moments[leaf] = self._updated(
                    leaves[leaf] * keep, gradient, moments.get(leaf)
                )
                # One tensor at a time, so that the old and the new state never both lie whole.
                mx.async_eval(leaves[leaf], moments[leaf])  # type: ignore[no-untyped-call]
        mx.eval(params, self.moments)

    def _updated(
        self, parameter: mx.array, gradient: mx.array, moments: Moments | None
    ) -> tuple[mx.array, Moments]:
        quantized = self._quantized and parameter.size >= SMALL
        if moments is None:
            moments = {"m": mx.zeros_like(parameter), "v": mx.zeros_like(parameter)}
        elif quantized:
            moments = _from_8_bits(moments, parameter)
        else:
            moments = dict(moments)
        updated = self._adam.apply_single(gradient, parameter, moments)
        return updated, _to_8_bits(moments) if quantized else moments


def _from_8_bits(moments: Moments, like: mx.array) -> Moments:
    return {
        "m": dequantize(moments["m"], moments["m_largest"], like, signed=True),
        "v": dequantize(moments["v"], moments["v_largest"], like, signed=False),
    }


def _to_8_bits(moments: Moments) -> Moments:
    m, m_largest = quantize(moments["m"], signed=True)
    v, v_largest = quantize(moments["v"], signed=False)
    return {"m": m, "m_largest": m_largest, "v": v, "v_largest": v_largest}

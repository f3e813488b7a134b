"""Which experts a model chose, call by call: recorded to a file, and read back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from localds.gguf.write import replaced
from localds.ops.cpu import CpuMoe

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.models.decoder import Decoder, Layer

    Floats = NDArray[np.float32]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Trace:
    """The calls of layers with experts, in order.

    Call i was layer `layers[i]` (int32, counted among those with experts) with `tokens[i]` (int32)
    tokens; `ids` int32 [sum of tokens, top_k] are the experts of each token, best first. Tokens of
    different calls of a layer with as many layers between them are a sequence.
    """

    n_layers: int
    n_experts: int
    layers: NDArray[np.int32]
    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]

    def save(self, path: Path) -> None:
        """Write a numpy archive (.npz), replacing `path` only when it is complete."""
        with replaced(path) as file:
            np.savez_compressed(
                file,
                version=_VERSION,
                n_layers=self.n_layers,
                n_experts=self.n_experts,
                layers=self.layers,
                tokens=self.tokens,
                ids=self.ids,
            )


def load_trace(path: Path) -> Trace:
    """Read what `Trace.save` wrote.

    Raises `ValueError` for any other file and `OSError` for one that cannot be opened.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                version = int(archive["version"])
                layers, tokens, ids = (archive[name] for name in ("layers", "tokens", "ids"))
                sizes = int(archive["n_layers"]), int(archive["n_experts"])
        # Damage reaches zipfile, zlib, numpy and Python's tokenizer, which raise a dozen types.
        except Exception as error:
            raise ValueError(
                f"{path} is not a whole trace of `localds trace` ({error}); record it again"
            ) from None
    trace = Trace(*sizes, layers, tokens, ids)
    if version != _VERSION or not _fits(trace):
        raise ValueError(f"{path} is damaged or of another version; record it again")
    return trace


def _fits(trace: Trace) -> bool:
    layers, tokens, ids = trace.layers, trace.tokens, trace.ids
    return bool(
        all(array.dtype == np.int32 for array in (layers, tokens, ids))
        and layers.ndim == tokens.ndim == 1
        and ids.ndim == 2
        and ids.shape[1] >= 1
        and len(layers) == len(tokens) >= 1
        and (tokens >= 1).all()
        and tokens.sum(dtype=np.int64) == len(ids)
        and ((layers >= 0) & (layers < trace.n_layers)).all()
        and ((ids >= 0) & (ids < trace.n_experts)).all()
        and (np.diff(np.sort(ids)) > 0).all()
    )


class Tracer:
    """A decoder like another one that notes every choice of its experts.

    Raises `ValueError` for a model without experts.
    """

    def __init__(self, decoder: Decoder[Floats]) -> None:
        self._calls: list[tuple[int, NDArray[np.int32]]] = []
        self._experts = decoder.geometry.experts
        self._n_layers = 0
        layers = [self._traced(layer) for layer in decoder.layers]
        if not self._n_layers:
            raise ValueError("the model has no routed experts; there is nothing to trace")
        self.decoder = replace(decoder, layers=layers)

    def trace(self) -> Trace:
        """What was noted so far. Raises `ValueError` before the first call."""
        if not self._calls:
            raise ValueError("stopped before the first layer: there is nothing to keep")
        return Trace(
            n_layers=self._n_layers,
            n_experts=self._experts,
            layers=np.array([layer for layer, _ in self._calls], np.int32),
            tokens=np.array([len(ids) for _, ids in self._calls], np.int32),
            ids=np.concatenate([ids for _, ids in self._calls]),
        )

    def _traced(self, layer: Layer[Floats]) -> Layer[Floats]:
        if not isinstance(layer.feed_forward, CpuMoe):
            return layer
        moe, number = layer.feed_forward, self._n_layers
        self._n_layers += 1

        def run(x: Floats) -> Floats:
            self._calls.append((number, moe.route(x)[0]))
            return moe(x)

        return replace(layer, feed_forward=run)

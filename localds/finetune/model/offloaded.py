"""Routed experts that do not all lie in device memory, in training.

All are computed on the device: first those in slots, then the others, which are brought there piece
by piece, and once more for the gradient. Where an expert lies changes nothing about its arithmetic.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from localds.finetune.model.gradients import with_vjp
from localds.finetune.model.offloaded_pieces import Filled, Pairs
from localds.memory.hot_set import HotSet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from localds.finetune.model.adapter import Parameters, Trained
    from localds.finetune.model.offloaded_adapters import StackAdapters
    from localds.finetune.model.offloaded_pieces import Piece, Pieces

    Ids = NDArray[np.int32]


class Gradients(NamedTuple):
    """The gradients of what went to the experts, of its weights, and of the experts' parameters."""

    x: mx.array
    weights: mx.array
    parameters: Parameters


@dataclass(slots=True)
class OffloadedExperts:
    """The routed experts of one layer, and perhaps adapters for each.

    All methods wait for what they compute, and raise `ReadError` where the disk fails. But for
    `chosen`, they are for where no gradient is traced.
    """

    pieces: Pieces
    adapters: StackAdapters
    untraced: Untraced
    uses: NDArray[np.uint32] = field(init=False)

    def __post_init__(self) -> None:
        self.uses = np.zeros(self.pieces.host.experts, np.uint32)

    def chosen(self, x: mx.array, ids: mx.array, trained: Trained) -> mx.array:
        """Each row of x [m, hidden] through its expert in ids uint32 [m], ascending: [m, hidden].

        Differentiable in x and in the parameters, also while gradients are traced.
        """
        pairs = Pairs.ascending(ids)

        def given(flat: Sequence[mx.array]) -> Trained:
            return trained._replace(parameters=self.adapters.tree(flat))

        def compute(x: mx.array, *flat: mx.array) -> list[mx.array]:
            return [self._outputs(x, pairs, given(flat))]

        def differentiate(x: mx.array, dy: mx.array, *flat: mx.array) -> list[mx.array]:
            ones = mx.ones(len(x))
            found = self._gradients(x, pairs, ones, dy, given(flat))
            return [found.x, *self.adapters.flat(found.parameters)]

        def vjp(arguments: tuple[mx.array, list[mx.array]], dy: mx.array, _: mx.array) -> object:
            x, flat = arguments
            return self.untraced(differentiate, x, dy, *flat)

        function = with_vjp(lambda x, flat: self.untraced(compute, x, *flat)[0], vjp)
        return function(x, self.adapters.flat(trained.parameters))

    def mixed(
        self, states: mx.array, ids: mx.array, weights: mx.array, trained: Trained
    ) -> mx.array:
        """The weighted sum of each token's experts, [n, hidden]; ids and weights [n, top_k]."""
        outputs = self._outputs(states, Pairs.of(ids), trained)
        return (outputs.reshape(*ids.shape, -1) * weights[..., None]).sum(axis=1)

    def mixed_gradients(
        self,
        states: mx.array,
        ids: mx.array,
        weights: mx.array,
        dy: mx.array,
        trained: Trained,
    ) -> Gradients:
        """The gradients of `mixed`, for the gradient dy [n, hidden] of what it returns."""
        found = self._gradients(states, Pairs.of(ids), weights.reshape(-1), dy, trained)
        dstates = found.x.reshape(*ids.shape, -1).sum(axis=1)
        mx.eval(dstates)
        return Gradients(dstates, found.weights.reshape(ids.shape), found.parameters)

    def _outputs(self, x: mx.array, pairs: Pairs, trained: Trained) -> mx.array:
        """What each pair's expert makes of its row of x [n, hidden]: [m, hidden]."""
        self.uses += np.bincount(pairs.experts, minlength=len(self.uses)).astype(np.uint32)
        outputs = Filled((len(pairs.experts), x.shape[1]))
        computing = _Computing()
        for piece in self.pieces.of(pairs.experts):
            rows, numbers = pairs.at(piece.pairs)
            values = self._layer(piece, trained)(x[rows], *self._part(piece, trained))
            outputs.put(numbers, values)
            computing.add([values], [outputs])
        return outputs.computed()

    def _gradients(
        self, x: mx.array, pairs: Pairs, weights: mx.array, dy: mx.array, trained: Trained
    ) -> Gradients:
        """For each pair the gradient of its row of x, [m, hidden], and of its weight [m].

        Of dy [n, hidden] each pair gets its row times its weight.
        """
        m = len(pairs.experts)
        dx, dweights = Filled((m, x.shape[1])), Filled((m,))
        slopes = [Filled(array.shape) for array in self.adapters.flat(trained.parameters)]
        computing = _Computing()
        for piece in self.pieces.of(pairs.experts):
            rows, numbers = pairs.at(piece.pairs)
            primals, back = [x[rows], *self._part(piece, trained)], dy[rows]
            scaled = back * weights[numbers][:, None]
            (values,), (dx_here, *found) = mx.vjp(self._layer(piece, trained), primals, [scaled])
            dweights_here = (values * back).sum(axis=-1)
            dx.put(numbers, dx_here)
            dweights.put(numbers, dweights_here)
            for slope, part in zip(slopes, found, strict=True):
                slope.put(mx.array(piece.ids), part)
            computing.add([dx_here, dweights_here, *found], [dx, dweights, *slopes])
        parameters = self.adapters.tree([slope.computed() for slope in slopes])
        return Gradients(dx.computed(), dweights.computed(), parameters)

    def reselect(self) -> None:
        """Give the slots to the experts that were used most so far."""
        slots = self.pieces.slots
        changes = HotSet(len(self.uses), self.uses).swaps(slots.experts, len(slots.experts))
        if changes:
            slots.swap(changes)

    def _layer(self, piece: Piece, trained: Trained) -> Callable[..., mx.array]:
        """What the experts of a piece compute, of rows and of their parameters."""
        layer, local = self.adapters.layer(piece), mx.array(piece.local)

        def compute(x: mx.array, *flat: mx.array) -> mx.array:
            return layer.chosen(x, local, trained._replace(parameters=self.adapters.tree(flat)))

        return compute

    def _part(self, piece: Piece, trained: Trained) -> list[mx.array]:
        ids = mx.array(piece.ids)
        return [array[ids] for array in self.adapters.flat(trained.parameters)]


class Untraced:
    """Calls functions where no gradient is traced: in a thread, with copies of what they are given.

    While a gradient is traced, MLX keeps all that arrays were computed from that depend on a traced
    one, weights among it. Traces belong to threads. The copies are made on the host, for nothing
    else cuts an array off from what it was computed from.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offloaded experts")

    def __call__(
        self, function: Callable[..., list[mx.array]], *arrays: mx.array
    ) -> list[mx.array]:
        """Return what the function returns, computed."""
        stream = mx.default_stream(mx.default_device())
        copies = [np.array(array) for array in arrays]

        def call() -> list[mx.array]:
            with mx.stream(stream):
                found = function(*map(mx.array, copies))
                mx.eval(found)
                return found

        waiting = self._thread.submit(call)
        try:
            return waiting.result()
        finally:
            waiting.exception()  # after Ctrl-C: only one thread at a time may compute

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class _Computing:
    """Lets the device compute one piece while the next is brought to it, and no more."""

    def __init__(self) -> None:
        self._values: list[mx.array] = []

    def add(self, values: list[mx.array], filled: list[Filled]) -> None:
        """Begin to compute a piece's `values`, and what they are put into."""
        # What is computed on the way takes memory as well: of one piece at a time.
        mx.eval(self._values)
        mx.async_eval([one.array for one in filled])  # type: ignore[no-untyped-call]
        self._values = values

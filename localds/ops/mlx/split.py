"""A mixture-of-experts layer of which some experts lie on the device, the others with the host.

The ids come to the host. Of few tokens, experts on the device are computed there, and those of the
host at the same time by the CPU's kernels. Of many tokens, and always where device and host share
their memory, the missing experts are brought to the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from localds.memory.hot_set import HotSet
from localds.ops.mlx.feed_forward import Routed, UseCounter, weighted_sum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from localds.ops.cpu import CpuMoe
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.feed_forward import Choose, Gated
    from localds.ops.mlx.slots import ExpertSlots
    from localds.ops.mlx.staging import HostExperts, Stager

    Ids = NDArray[np.int32]

# With so many pairs for each expert, nearly all are chosen by some token.
_PAIRS_FOR_ALL = 4


@dataclass(frozen=True, slots=True)
class Staging:
    """How experts come to the device: `piece` of them at a time, for `stream_from` tokens on.

    With `adopt`, those that few tokens miss take slots of others.
    """

    backend: Backend
    stager: Stager
    piece: int
    stream_from: float
    adopt: bool


@dataclass(slots=True)
class SplitMoe:
    """The layer. `rest` are its experts on the CPU, `host` where they lie.

    What a pass computes depends on the slots alone, and these on the passes before.
    """

    norm: mx.array
    eps: float
    choose: Choose
    shared: Gated | None
    slots: ExpertSlots
    host: HostExperts
    rest: CpuMoe
    staging: Staging
    hot: HotSet
    following: SplitMoe | None = None
    counter: UseCounter = field(init=False)
    hits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.counter = UseCounter(self.host.experts)
        self.rest.set_elsewhere(self.slots.elsewhere)

    def __call__(self, x: mx.array) -> mx.array:
        """Return x + experts(norm(x))."""
        return self.add_experts(x, self.route(x))

    def route(self, x: mx.array) -> Routed:
        """Where x [n, hidden] would go."""
        h = mx.fast.rms_norm(x, self.norm, self.eps)
        return Routed(h, *self.choose(h))

    def add_experts(self, x: mx.array, routed: Routed) -> mx.array:
        """X + the experts of `routed`, and the shared one.

        Waits for what is computed so far, and computes what the host has to. Raises `ReadError`
        where the disk fails.
        """
        mx.eval(x, routed.states, routed.ids, routed.weights)
        chosen = np.array(routed.ids).astype(np.int32)
        self.counter.add(chosen)
        self.hot.add(chosen)
        out = x if self.shared is None else self.shared.plus(x, routed.states)
        if self.staging.adopt:
            self._adopt(chosen)
        slots = self.slots.of[chosen]
        hits = int(np.count_nonzero(slots >= 0))
        self.hits += hits
        if self.slots.gated is not None and hits == slots.size:
            ids = mx.array(slots.astype(np.uint32))
            return self.slots.gated.plus_chosen(out, routed.states, ids, routed.weights)
        if len(chosen) >= self.staging.stream_from:
            return out + self._staged(routed, chosen)
        return self._beside_cpu(x, out, routed, chosen, slots)

    def uses(self) -> NDArray[np.uint64]:
        """Tokens sent to each expert since the layer was made, uint64 [experts]."""
        return self.counter.uses.copy()

    def reselect(self, most: int) -> None:
        """Give up to `most` slots to experts that were used more of late than those in them."""
        changes = self.hot.swaps(self.slots.experts, most)
        if changes:
            self._swap(changes)

    def _swap(self, changes: list[tuple[int, int]]) -> None:
        self.staging.stager.settle()
        self.slots.swap(changes)
        self.rest.set_elsewhere(self.slots.elsewhere)

    def _adopt(self, chosen: Ids) -> None:
        """Bring what is missing into slots, if all that is chosen fits into them."""
        wanted = np.zeros(self.host.experts, np.bool_)
        wanted[chosen] = True
        missing = np.flatnonzero(wanted & (self.slots.of < 0)).tolist()
        if missing and wanted.sum() <= len(self.slots.experts):
            leaving = self.hot.least(self.slots.experts, wanted)
            self._swap(list(zip(leaving, missing, strict=False)))

    def _beside_cpu(
        self, x: mx.array, out: mx.array, routed: Routed, chosen: Ids, slots: Ids
    ) -> mx.array:
        """Experts in slots on the device, the others on the CPU at the same time."""
        weights = np.array(routed.weights)
        out = self._add_hits(out, routed, slots, weights)
        mx.async_eval(out)  # type: ignore[no-untyped-call]
        self.staging.stager.settle()
        rest = np.zeros(x.shape, np.float32)
        self.rest.add_rest(np.array(x), chosen, weights, rest)
        return out + mx.array(rest)

    def _add_hits(
        self, out: mx.array, routed: Routed, slots: Ids, weights: NDArray[np.float32]
    ) -> mx.array:
        """Out + the experts in slots. Each token's come first in a narrower table."""
        missing = slots < 0
        width = int((~missing).sum(axis=1).max())
        if width == 0 or self.slots.gated is None:
            return out
        order = np.argsort(missing, axis=1, kind="stable")[:, :width]
        rows = np.arange(len(slots))[:, None]
        mine = np.where(missing, 0, weights)[rows, order]
        # Where a token has fewer, any slot does: its weight is 0.
        ids = np.where(missing, 0, slots)[rows, order].astype(np.uint32)
        return self.slots.gated.plus_chosen(out, routed.states, mx.array(ids), mx.array(mine))

    def _staged(self, routed: Routed, chosen: Ids) -> mx.array:
        """The weighted sum of the experts, all computed on the device, [n, hidden]."""
        outputs, places, before = [], [], None
        for gated, index, pairs in self._pieces(chosen):
            tokens = mx.array((pairs // chosen.shape[1]).astype(np.uint32))
            output = gated.chosen(routed.states[tokens], mx.array(index))
            mx.async_eval(output)  # type: ignore[no-untyped-call]
            if before is not None:
                mx.eval(before)  # no more than two pieces lie on the device
            before = output
            outputs.append(output)
            places.append(pairs)
        positions = np.empty(chosen.size, np.uint32)
        positions[np.concatenate(places)] = np.arange(chosen.size)
        return weighted_sum(mx.concatenate(outputs)[mx.array(positions)], routed.weights)

    def _pieces(self, chosen: Ids) -> Iterator[tuple[Gated, NDArray[np.uint32], Ids]]:
        """Stacks of experts, with the index of the expert of each pair and the pairs themselves.

        First those in slots, then the others, which are brought to the device piece by piece.
        """
        flat = chosen.reshape(-1)
        index = np.full(self.host.experts, -1, np.int32)
        if self.slots.gated is not None:
            yield from self._piece(self.slots.gated, self.slots.of, flat)
        pieces = self._missing(chosen)
        stager = self.staging.stager
        for ids, parts in stager.read(self.host, pieces):
            if ids is pieces[-1] and self.following is not None:
                self.following.prepare(chosen.size)
            index[:] = -1
            index[ids] = np.arange(len(ids))
            yield from self._piece(self.host.load(self.staging.backend, parts), index, flat)

    @staticmethod
    def _piece(
        gated: Gated, index: Ids, flat: Ids
    ) -> Iterator[tuple[Gated, NDArray[np.uint32], Ids]]:
        at = index[flat]
        pairs = np.flatnonzero(at >= 0)
        pairs = pairs[np.argsort(at[pairs], kind="stable")]
        if len(pairs):
            yield gated, at[pairs].astype(np.uint32), pairs.astype(np.int32)

    def _missing(self, chosen: Ids) -> list[Ids]:
        """The experts to bring to the device, in pieces."""
        if self._wants_all(chosen.size):
            return self._in_pieces(self.slots.of < 0)
        used = np.zeros(self.host.experts, np.bool_)
        used[chosen] = True
        return self._in_pieces(used & (self.slots.of < 0))

    def _in_pieces(self, experts: NDArray[np.bool_]) -> list[Ids]:
        ids = np.flatnonzero(experts).astype(np.int32)
        return [ids[i : i + self.staging.piece] for i in range(0, len(ids), self.staging.piece)]

    def _wants_all(self, pairs: int) -> bool:
        return pairs >= _PAIRS_FOR_ALL * self.host.experts

    def prepare(self, pairs: int) -> None:
        """Begin to read what this layer will need of a pass that has come to the one before."""
        if self._wants_all(pairs) and (pieces := self._in_pieces(self.slots.of < 0)):
            self.staging.stager.expect(self.host, pieces[0])

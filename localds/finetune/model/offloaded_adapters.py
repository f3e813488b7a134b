"""Adapters of stacked experts that are computed some experts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.model.adapter import Adapter, StackedLinear
from localds.finetune.model.feed_forward import ResidentExperts
from localds.finetune.model.frozen import FrozenStack

if TYPE_CHECKING:
    from localds.finetune.model.adapter import Parameters
    from localds.finetune.model.offloaded_pieces import Piece

NewAdapter = Callable[[str, tuple[int, ...], Callable[[], mx.array]], Adapter | None]
"""The adapter for a stack by its name and shape, and how to find its rows' squared lengths."""


@dataclass(frozen=True, slots=True)
class PieceAdapter(Adapter):
    """An adapter for rows `pairs` of `total`: of them drops out what would drop out among all."""

    pairs: mx.array
    total: int

    def dropped(self, x: mx.array, keys: mx.array | None) -> mx.array:
        """As `Adapter.dropped`."""
        if keys is None or self.dropout == 0:
            return x
        shape = (self.total, x.shape[-1])
        kept = mx.random.bernoulli(1 - self.dropout, shape, key=keys[self.number])[self.pairs]
        return mx.where(kept, x / (1 - self.dropout), 0)


@dataclass(frozen=True, slots=True)
class StackAdapters:
    """Those of gate, up and down; None for those that have none.

    Parameters of a layer are a tree, or flat: the arrays of the tree in a fixed order.
    """

    gate: Adapter | None
    up: Adapter | None
    down: Adapter | None

    def layer(self, piece: Piece) -> ResidentExperts:
        """The experts of a piece, for its pairs."""
        adapters = (self.gate, self.up, self.down)
        stacks = (piece.gate, piece.up, piece.down)
        gate, up, down = (
            StackedLinear(FrozenStack(stack), _for_piece(adapter, piece))
            for stack, adapter in zip(stacks, adapters, strict=True)
        )
        return ResidentExperts(gate, up, down)

    @property
    def names(self) -> tuple[str, ...]:
        """What the adapters' parameters are called."""
        return tuple(a.name for a in (self.gate, self.up, self.down) if a is not None)

    def flat(self, parameters: Parameters) -> list[mx.array]:
        """The arrays of these adapters."""
        return [parameters[name][kind] for name, kind in self._keys()]

    def tree(self, flat: Sequence[mx.array]) -> Parameters:
        """The opposite of `flat`."""
        tree: Parameters = {name: {} for name in self.names}
        for (name, kind), array in zip(self._keys(), flat, strict=True):
            tree[name][kind] = array
        return tree

    def _keys(self) -> list[tuple[str, str]]:
        adapters = [a for a in (self.gate, self.up, self.down) if a is not None]
        return [
            (a.name, kind) for a in adapters for kind in ("abm" if a.squares is not None else "ab")
        ]


def _for_piece(adapter: Adapter | None, piece: Piece) -> Adapter | None:
    if adapter is None:
        return None
    values = {f.name: getattr(adapter, f.name) for f in fields(adapter)}
    if adapter.squares is not None:
        values["squares"] = adapter.squares[mx.array(piece.ids)]
    values["shape"] = (len(piece.ids), *adapter.shape[1:])
    return PieceAdapter(**values, pairs=mx.array(piece.pairs), total=piece.total)

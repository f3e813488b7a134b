"""What every architecture says of itself: the figures that plans, caches and `inspect` need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a model. Widths are in elements per token and layer.

    `cache_width` is the row that the cache keeps; `expanded_width` what plain keys and values of
    all heads would take.
    """

    architecture: str
    layers: int
    dense_layers: int
    hidden: int
    vocabulary: int
    context_length: int
    heads: int
    experts: int
    experts_used: int
    experts_shared: int
    cache_width: int
    expanded_width: int

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers - self.dense_layers if self.experts else 0

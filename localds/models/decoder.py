"""The layer loop shared by every architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from localds.memory.latents import LatentCache

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from threading import Event

    from numpy.typing import NDArray

    from localds.models.geometry import Geometry
    from localds.models.weights import Weights
    from localds.ops import Attention, Embedding, FeedForward, Head, Ops
    from localds.sampling import Sampler

X = TypeVar("X")


class Interrupted(Exception):  # noqa: N818  it is no error
    """Somebody set the event that ends a forward pass."""


@dataclass(frozen=True, slots=True)
class Layer(Generic[X]):
    """One block: attention, then feed-forward, each adding to the residual stream."""

    attention: Attention[X]
    feed_forward: FeedForward[X]


@dataclass(frozen=True, slots=True)
class Decoder(Generic[X]):
    """A model prepared on one device."""

    geometry: Geometry
    embedding: Embedding[X]
    layers: Sequence[Layer[X]]
    head: Head[X]

    def new_cache(self, capacity: int, cache_type: str) -> LatentCache:
        """An empty cache for up to `capacity` tokens, where this decoder's layers expect it.

        Raises `ContextError` for a capacity that does not fit, `ValueError` for the cache type.
        """
        return LatentCache(self.geometry.layers, self.geometry.cache_width, capacity, cache_type)

    def forward(
        self,
        ids: NDArray[np.int32],
        cache: LatentCache,
        *,
        last_only: bool = True,
        interrupt: Event | None = None,
        on_share: Callable[[float], None] | None = None,
    ) -> NDArray[np.float32]:
        """Run tokens `ids` int32 [n] after the `cache.length` tokens already in the cache.

        Returns logits float32 [n, n_vocab], or [1, n_vocab] with `last_only`. The cache grows by n
        only when all layers are done, so that an interrupted call leaves it as it was. Setting
        `interrupt`, from another thread, ends the pass within an operation, with
        `Interrupted`. `on_share` is told between operations what share of them is done.
        """
        logits = self.head(self._run_layers(ids, cache, interrupt, on_share), last_only=last_only)
        cache.extend(len(ids))
        return logits

    def tokens(
        self,
        logits: NDArray[np.float32],
        cache: LatentCache,
        sampler: Sampler,
        history: list[int],
        interrupt: Event | None = None,
    ) -> Generator[int, None, None]:
        """Yield the ids that follow, by `sampler` from `logits` [n_vocab] of the last row.

        `history` are the tokens whose rows are in the cache. A token's row is computed only when
        the next id is asked for; then `history` and the cache grow by it. Raises `ContextError`
        where it does not fit, `Interrupted` as `forward` does, `ValueError` as `Sampler.sample`
        does. At every yield, and however this ends, the cache holds the rows of `history`.
        """
        while True:
            token = sampler.sample(logits, history)
            yield token
            logits = self.forward(np.array([token], np.int32), cache, interrupt=interrupt)[0]
            history.append(token)

    def states(self, ids: NDArray[np.int32], cache: LatentCache) -> X:
        """Like `forward`, but stops before the head: the hidden states of `ids`."""
        x = self._run_layers(ids, cache)
        cache.extend(len(ids))
        return x

    def _run_layers(
        self,
        ids: NDArray[np.int32],
        cache: LatentCache,
        interrupt: Event | None = None,
        on_share: Callable[[float], None] | None = None,
    ) -> X:
        past = cache.length
        cache.reserve(len(ids))
        x = self.embedding(ids)
        for index, (layer, rows) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x = layer.attention(x, rows, past)
            check_interrupt(interrupt)
            x = layer.feed_forward(x)
            check_interrupt(interrupt)
            if on_share:
                on_share((index + 1) / len(self.layers))
        return x


def check_interrupt(interrupt: Event | None) -> None:
    """Raise `Interrupted` if the event was set."""
    if interrupt is not None and interrupt.is_set():
        raise Interrupted


def assemble(
    geometry: Geometry, weights: Weights, layers: Sequence[Layer[X]], ops: Ops[X], eps: float
) -> Decoder[X]:
    """Put embedding and head around `layers`; without an output matrix the embedding serves."""
    table = weights["token_embd"]
    return Decoder(
        geometry=geometry,
        embedding=ops.embedding(table),
        layers=layers,
        head=ops.head(weights["output_norm"], weights.find("output") or table, eps),
    )

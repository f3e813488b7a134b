"""Tokens one after the other, the device always a step ahead of the id that is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from localds.models.decoder import check_interrupt
from localds.ops.mlx.computing import computing
from localds.ops.mlx.sampling import DeviceSampler
from localds.sampling import check_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from threading import Event

    from numpy.typing import NDArray

    from localds.ops.mlx.cache import DeviceCache
    from localds.sampling import Sampler

    Step = Callable[[mx.array, DeviceCache], mx.array]


def pipelined(
    step: Step,
    logits: NDArray[np.float32],
    cache: DeviceCache,
    sampler: Sampler,
    history: list[int],
    interrupt: Event | None,
    stream: mx.Stream,
) -> Generator[int, None, None]:
    """Yield ids as `Decoder.tokens` does, for a `sampler` that `samples_on_device`.

    `step(ids, cache)` makes the graph that writes the row of `ids` int32 [1] behind the rows of
    `cache` and gives logits [1, n_vocab]; it is computed on `stream`. When an id is yielded, its
    step and the choice of the next id are on their way, but `cache` and `history` grow only when
    the next id is asked for. An interrupt is noticed between tokens. At the end, what is on its way
    is waited for; the row that it wrote does not count.
    """
    run = _Run(step, cache, DeviceSampler(sampler), stream)
    token = sampler.sample(logits, history)
    following = run.begin(mx.array([token], mx.int32))
    try:
        while following:
            yield token
            check_interrupt(interrupt)
            cache.extend_computed(1)
            history.append(token)
            current, following = following, None
            following = run.begin(current.ids)
            token = run.read(current)
        yield token
        check_interrupt(interrupt)
        cache.reserve(1)  # raises: only for want of room was nothing begun
    finally:
        if following:
            run.wait(following)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step on its way: its logits [1, n_vocab], what `DeviceSampler` chose, and its id [1]."""

    logits: mx.array
    chosen: mx.array
    ids: mx.array


@dataclass(frozen=True, slots=True)
class _Run:
    """Enters the stream for each call: around a `yield` it would be the caller's too."""

    step: Step
    cache: DeviceCache
    choose: DeviceSampler
    stream: mx.Stream

    def begin(self, ids: mx.array) -> _Begun | None:
        """Set the device to the step of `ids` and the next choice; None where it has no room."""
        if self.cache.length == self.cache.capacity:
            return None
        with computing(self.stream):
            logits = self.step(ids, self.cache)
            chosen = self.choose(logits[0])
            mx.async_eval(chosen)  # type: ignore[no-untyped-call]
            return _Begun(logits, chosen, chosen[:1])

    def wait(self, begun: _Begun) -> None:
        """Until it is computed."""
        with computing(self.stream):
            mx.eval(begun.chosen)

    def read(self, begun: _Begun) -> int:
        """Wait for the id. Raises `ValueError` for logits that are not finite."""
        with computing(self.stream):
            token, finite = cast("list[int]", begun.chosen.tolist())
            if not finite:
                check_finite(np.array(begun.logits)[0])
        return token

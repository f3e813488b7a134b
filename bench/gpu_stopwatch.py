"""Clocks around the parts of a divided layer, for as long as they are wanted."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from localds.ops.mlx import split
from localds.ops.mlx.split import SplitMoe
from localds.ops.mlx.staging import HostExperts

GPU, CPU = "waiting for the GPU", "experts on the CPU"
BRINGING, READING = "bringing experts", "reading experts, beside the rest"


class With:
    """An object with some of its methods replaced."""

    def __init__(self, of: Any, **methods: Callable[..., Any]) -> None:
        self._of = of
        self.__dict__ |= methods

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


@contextmanager
def watched(layers: Sequence[SplitMoe]) -> Iterator[dict[str, float]]:
    """Seconds by name, added up while this lasts."""
    seconds: dict[str, float] = defaultdict(float)
    seconds[GPU] = seconds[CPU] = seconds[BRINGING] = 0.0

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(split, "mx", With(split.mx, eval=timed(GPU, split.mx.eval)))
        )
        for name, method in (BRINGING, "load"), (READING, "read"):
            clocked = timed(name, getattr(HostExperts, method))
            stack.enter_context(patch.object(HostExperts, method, clocked))
        for layer in layers:
            rest = With(layer.rest, add_rest=timed(CPU, layer.rest.add_rest))
            stack.enter_context(patch.object(layer, "rest", rest))
        yield seconds

"""What it costs to watch a model while it decodes: speed with readings from another thread.

usage: monitor_cost.py MODEL.gguf [--ram 5GiB] [--readings 10] [--tokens 128] [--rounds 15]

Decodes the same tokens with and without `--readings` a second, in turns, the order changing from
round to round; prints both medians, the median of the rounds' ratios, and how long a reading takes.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import localds
from localds import monitor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localds.model import Model
    from localds.session import Session

PROMPT = 8


class Watcher:
    """A thread that reads so many times a second; `seconds` are what the readings took."""

    def __init__(self, model: Model, session: Session, readings: float) -> None:
        self.seconds: list[float] = []
        self._model, self._session = model, session
        self._pause = 1 / readings

    @contextmanager
    def watching(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=[stop])
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(self._pause):
            started = time.perf_counter()
            monitor.read(self._model, self._session)
            self.seconds.append(time.perf_counter() - started)


def speed(session: Session, tokens: list[int]) -> float:
    """Tokens a second."""
    session.truncate(0)
    session.evaluate(tokens[:PROMPT])
    started = time.perf_counter()
    for token in tokens[PROMPT:]:
        session.evaluate([token])
    return (len(tokens) - PROMPT) / (time.perf_counter() - started)


def compare(
    session: Session, tokens: list[int], watcher: Watcher, rounds: int
) -> list[tuple[float, float]]:
    """Speed alone and watched, round by round."""
    results = []
    for number in range(rounds):
        speeds = {}
        for watched in (False, True) if number % 2 else (True, False):
            if watched:
                with watcher.watching():
                    speeds[True] = speed(session, tokens)
            else:
                speeds[False] = speed(session, tokens)
        results.append((speeds[False], speeds[True]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram")
    parser.add_argument("--readings", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    context = PROMPT + args.tokens
    with localds.load(args.model, ram=args.ram, context=context) as model:
        if model.experts:
            model.experts.wait_warm()
        session = model.session(context)
        tokens = [(7919 * i + 11) % model.geometry.vocabulary for i in range(context)]
        speed(session, tokens)  # faults the weights in
        watcher = Watcher(model, session, args.readings)
        results = compare(session, tokens, watcher, args.rounds)
        figures = monitor.figures(model)
    alone, watched = (statistics.median(column) for column in zip(*results, strict=True))
    ratio = statistics.median(w / a for a, w in results)
    print(f"alone {alone:.2f} tokens/s, watched {watched:.2f}, ratio {ratio:.4f}")
    took = sorted(watcher.seconds)
    print(
        f"{len(took)} readings: median {1e3 * statistics.median(took):.3f} ms, "
        f"longest {1e3 * took[-1]:.3f} ms"
    )
    if figures.hits:
        print(f"hits {figures.hits} of {figures.hits + figures.misses}")


if __name__ == "__main__":
    main()

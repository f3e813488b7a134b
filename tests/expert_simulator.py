"""Policies that decide which experts stay in memory, replayed over recorded choices.

A call is one layer's work on some tokens: the experts it needs, ascending, and how many tokens need
each. Every policy is told the calls in order and counts hits: experts that were there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from localds.routing_trace import Trace

Key = tuple[int, int]


@dataclass(frozen=True)
class Call:
    layer: int
    tokens: int
    uses: tuple[tuple[int, int], ...]
    """(expert, tokens that chose it), ascending."""

    @property
    def keys(self) -> list[Key]:
        return [(self.layer, expert) for expert, _ in self.uses]


def calls(trace: Trace) -> Iterator[Call]:
    start = 0
    for layer, tokens in zip(trace.layers.tolist(), trace.tokens.tolist(), strict=True):
        experts, counts = np.unique(trace.ids[start : start + tokens], return_counts=True)
        yield Call(layer, tokens, tuple(zip(experts.tolist(), counts.tolist(), strict=True)))
        start += tokens


class Policy(Protocol):
    hits: int
    uses: int

    def call(self, call: Call) -> None: ...


def replay(policy: Policy, sequence: Iterable[Call]) -> float:
    """The share of hits."""
    for call in sequence:
        policy.call(call)
    return policy.hits / policy.uses


class Lru:
    """Whoever was used least recently leaves."""

    def __init__(self, slots: int) -> None:
        self.hits = self.uses = 0
        self._slots = slots
        self._kept: OrderedDict[Key, None] = OrderedDict()

    def call(self, call: Call) -> None:
        for key in call.keys:
            self.uses += 1
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                continue
            if len(self._kept) == self._slots:
                self._kept.popitem(last=False)
            self._kept[key] = None


class Lfu:
    """Whoever was used by the fewest tokens, ever, leaves; of several the least recent."""

    def __init__(self, slots: int) -> None:
        self.hits = self.uses = 0
        self._slots = slots
        self._kept: set[Key] = set()
        self._count: Counter[Key] = Counter()
        self._last: dict[Key, int] = {}

    def call(self, call: Call) -> None:
        for (_, tokens), key in zip(call.uses, call.keys, strict=True):
            self.uses += 1
            self.hits += key in self._kept
            if key not in self._kept and len(self._kept) == self._slots:
                self._kept.remove(min(self._kept, key=lambda k: (self._count[k], self._last[k])))
            self._count[key] += tokens
            self._last[key] = self.uses
            self._kept.add(key)


class Optimum:
    """Knows the future: whoever is used latest leaves, or never comes (Belady's MIN)."""

    def __init__(self, slots: int, sequence: Iterable[Call]) -> None:
        self.hits = self.uses = 0
        self._slots = slots
        self._kept: dict[Key, int] = {}
        self._next: dict[Key, list[int]] = {}
        clock = 0
        for call in sequence:
            for key in call.keys:
                self._next.setdefault(key, []).append(clock)
                clock += 1
        for times in self._next.values():
            times.append(clock + len(self._next))  # never
            times.reverse()

    def call(self, call: Call) -> None:
        for key in call.keys:
            self.uses += 1
            times = self._next[key]
            times.pop()
            if key in self._kept:
                self.hits += 1
            elif len(self._kept) == self._slots:
                latest = max(self._kept, key=self._kept.__getitem__)
                if self._kept[latest] <= times[-1]:
                    continue
                del self._kept[latest]
            self._kept[key] = times[-1]


class Engine:
    """What native/experts/policy.h does, and says why."""

    MEMORY = 1024

    def __init__(self, main: int, window: int) -> None:
        self.hits = self.uses = 0
        self._most_main, self._most_window = main, window
        self._main: set[Key] = set()
        self._window: list[Key] = []
        self._count: Counter[Key] = Counter()
        self._pass: Counter[Key] = Counter()
        self._last: dict[Key, int] = {}
        self._layer: int | None = None
        self._tokens = 0

    @classmethod
    def of(cls, slots: int, top_k: int) -> Engine:
        window = max(top_k, slots // 16)
        return cls(slots - window, window)

    def preload(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if len(self._main) == self._most_main:
                return
            self._main.add(key)

    def call(self, call: Call) -> None:
        if self._layer is None or call.layer <= self._layer:
            self._begin_pass(call.tokens)
        self._layer = call.layer
        needed = set(call.keys)
        for (_, tokens), key in zip(call.uses, call.keys, strict=True):
            self.uses += 1
            self._pass[key] += tokens
            self._last[key] = self.uses
            if key in self._main:
                self.hits += 1
                continue
            if key in self._window:
                self.hits += 1
                self._window.remove(key)
            elif len(self._window) == self._most_window:
                self._leave_window(needed)
            self._window.append(key)

    def _begin_pass(self, tokens: int) -> None:
        self._count.update(self._pass)
        self._pass.clear()
        if self._tokens >= self.MEMORY:
            self._count = Counter({key: count // 2 for key, count in self._count.items()})
            self._tokens = 0
        self._tokens += tokens

    def _leave_window(self, needed: set[Key]) -> None:
        candidate = self._window.pop(0)
        if len(self._main) < self._most_main:
            self._main.add(candidate)
            return
        victims = self._main - needed
        if not victims:
            return
        victim = min(victims, key=lambda key: (self._count[key], self._last.get(key, 0), key))
        if self._count[candidate] > self._count[victim]:
            self._main.remove(victim)
            self._main.add(candidate)

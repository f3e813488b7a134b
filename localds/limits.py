"""How fast the machine could do a run's work at best, and where the run's time went instead."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OUTSIDE = "outside the kernels"


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the machine does at best, a second."""

    read: float
    """Bytes from memory."""
    int8: float
    """Multiply-adds of 8-bit integers."""
    floats: float
    """Multiply-adds of float32."""
    disk: float = math.inf
    """Bytes from the disk that the model lies on; infinite where nothing is read from there."""


@dataclass(frozen=True, slots=True)
class Step:
    """The calls of one step of a run, all layers together."""

    name: str
    calls: int
    seconds: float
    bytes: int
    """Of weight matrices and cache rows that a call cannot avoid reading, each once a call.

    The rows of the embedding, the norms and the activations are too small to count. Of the experts
    those are read that some token of the call chose.
    """
    int8: int
    """Multiply-adds of weights in integer types, that no way of computing the step avoids."""
    floats: int
    """Multiply-adds of float weights and of attention, likewise."""


def add_up(profiles: Iterable[Iterable[Step]]) -> list[Step]:
    """The steps of several runs by name, in the order in which they first come."""
    sums: dict[str, Step] = {}
    for step in (step for profile in profiles for step in profile):
        known = sums.get(step.name)
        if known is not None:
            step = replace(
                known,
                calls=known.calls + step.calls,
                seconds=known.seconds + step.seconds,
                bytes=known.bytes + step.bytes,
                int8=known.int8 + step.int8,
                floats=known.floats + step.floats,
            )
        sums[step.name] = step
    return list(sums.values())


@dataclass(frozen=True, slots=True)
class LeastTime:
    """The least seconds that work takes, and what takes them."""

    seconds: float
    by: Literal["reading", "arithmetic", "disk"]


def least_time(steps: Iterable[Step], peaks: Peaks, disk_bytes: int = 0) -> LeastTime:
    """How long `steps` and reading `disk_bytes` from disk take at least.

    Reading from memory, from disk, and arithmetic may overlap, so the longest counts. Weights that
    stay in the processor's caches are read faster than from memory: small models may beat the limit
    by reading.
    """
    steps = list(steps)
    reading = sum(step.bytes for step in steps) / peaks.read
    # The same units of the processor do both kinds, so these add up.
    arithmetic = (
        sum(step.int8 for step in steps) / peaks.int8
        + sum(step.floats for step in steps) / peaks.floats
    )
    disk = disk_bytes / peaks.disk
    if disk > max(reading, arithmetic):
        return LeastTime(disk, "disk")
    if reading >= arithmetic:
        return LeastTime(reading, "reading")
    return LeastTime(arithmetic, "arithmetic")


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """What one step took of a token or a run, on average.

    `share` is of all time, from 0 to 1. `gbs` are gigabytes a second, `int8_gops` and `float_gops`
    thousand million multiply-adds a second, while the step ran. See `Step` for what is counted.
    """

    name: str
    calls: float
    ms: float
    share: float
    bytes: float
    int8: float
    floats: float
    gbs: float
    int8_gops: float
    float_gops: float


def profile_rows(steps: Sequence[Step], seconds: float, units: int) -> list[ProfileRow]:
    """Rows for `steps`, which were part of `seconds` and computed `units` tokens or runs.

    The last row, `OUTSIDE`, is what no step took: the interpreter, and calls into the library.
    """
    rest = seconds - sum(step.seconds for step in steps)
    return [_row(step, seconds, units) for step in (*steps, Step(OUTSIDE, 0, rest, 0, 0, 0))]


def _row(step: Step, seconds: float, units: int) -> ProfileRow:
    def giga(amount: int) -> float:
        return amount / step.seconds / 1e9 if amount else 0.0

    return ProfileRow(
        name=step.name,
        calls=step.calls / units,
        ms=1e3 * step.seconds / units,
        share=step.seconds / seconds,
        bytes=step.bytes / units,
        int8=step.int8 / units,
        floats=step.floats / units,
        gbs=giga(step.bytes),
        int8_gops=giga(step.int8),
        float_gops=giga(step.floats),
    )

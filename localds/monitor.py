"""What a model is doing while it does it: its experts, its memory and its reads from the disk.

Every function may be called from any thread, also while the model computes, and takes less than a
millisecond. What one reading tells was not all true at the same instant.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from localds.memory.plan import ROUTED
from localds.ops import ExpertLayer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from localds.memory.gpu_plan import GpuPlacement
    from localds.model import Model
    from localds.session import Session

_STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True, eq=False)
class ExpertActivity:
    """A model's routed experts: `layers` are the numbers of the blocks that have any.

    `uses` uint64 [layers, experts] counts the tokens that were sent to each expert since the model
    was loaded. `resident` bool [layers, experts] says which experts lie in memory now, or of a
    model on a GPU, in the GPU's memory. `near` and `far` are words for where these and others lie.
    """

    layers: tuple[int, ...]
    uses: NDArray[np.uint64]
    resident: NDArray[np.bool_]
    near: str = "in memory"
    far: str = "on disk"


@dataclass(frozen=True, slots=True)
class Tier:
    """Bytes of one kind in one place, and how many it may become; None where that has no limit."""

    name: str
    used_bytes: int
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Figures:
    """How experts were found since the model was loaded; zeros where all lie in one place.

    An expert that a layer needed in one pass was a hit if it was in memory already, or on its way
    there unasked, else a miss. Of a model on a GPU, each use by a token counts, and is a hit if
    the expert lay in the GPU's memory. `read_bytes` are all bytes from the disk, also those that
    filled the pool or were read ahead. `stall_seconds` is how long layers waited for them.
    """

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    stall_seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """All that `read` tells. `experts` is None for a model without routed experts."""

    experts: ExpertActivity | None
    tiers: tuple[Tier, ...]
    figures: Figures


def read(model: Model, session: Session | None = None) -> Reading:
    """Look at a model, and at the latent cache of `session`."""
    resident = _resident(model)
    return Reading(
        experts=_activity(model, _nearest(model, resident)),
        tiers=_tiers(model, session, resident),
        figures=figures(model),
    )


def expert_activity(model: Model) -> ExpertActivity | None:
    """Which experts are used and which are in memory; None for a model without routed experts."""
    return _activity(model, _nearest(model, _resident(model)))


def memory_tiers(model: Model, session: Session | None = None) -> tuple[Tier, ...]:
    """What lies where, in bytes.

    - "GPU: weights", "GPU: experts", "GPU: latent cache": of a model on a GPU, what lies in its
      memory: all but the routed experts, those of them, and the rows.
    - "RAM: weights": all but the routed experts. They lie in memory, or in the map of the file,
      from which the system takes them in as they are first used.
    - "RAM: experts": routed experts in memory; of a pool, the slots that are filled, of those that
      there are.
    - "RAM: latent cache": the rows of the tokens of `session`, of its full context; without a
      session, none of what the model's plan has for it.
    - "disk": routed experts that do not lie in memory, of all.
    - "process": what this process holds in memory now, pages of files included, of the model's
      budget. The tiers in RAM are in it. Left out where the system does not say (macOS).

    Those of experts are left out for a model without them.
    """
    return _tiers(model, session, _resident(model))


def figures(model: Model) -> Figures:
    """How experts were found since the model was loaded."""
    stats = None if model.experts is None else model.experts.figures()
    read, stalled = (stats.read_bytes, stats.stall_seconds) if stats else (0, 0.0)
    if model.on_gpu is not None:
        hits, uses = model.on_gpu.hits()
        return Figures(hits, uses - hits, read, stalled)
    return Figures(stats.hits, stats.uses - stats.hits, read, stalled) if stats else Figures()


def _resident(model: Model) -> NDArray[np.bool_] | None:
    """Which experts lie in the pool, bool [layers, experts]; None for a model without a pool."""
    return None if model.experts is None else model.experts.resident()


def _nearest(model: Model, resident: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Which experts lie where they are computed fastest; None where all do."""
    return resident if model.on_gpu is None else model.on_gpu.resident()


def _activity(model: Model, resident: NDArray[np.bool_] | None) -> ExpertActivity | None:
    counts = {
        number: layer.feed_forward.uses()
        for number, layer in enumerate(model.decoder.layers)
        if isinstance(layer.feed_forward, ExpertLayer)
    }
    if not counts:
        return None
    uses = np.stack(list(counts.values()))
    if resident is None:
        resident = np.ones(uses.shape, np.bool_)
    places = ("in memory", "on disk") if model.on_gpu is None else ("on the GPU", "elsewhere")
    return ExpertActivity(tuple(counts), uses, resident, *places)


def _tiers(
    model: Model, session: Session | None, resident: NDArray[np.bool_] | None
) -> tuple[Tier, ...]:
    plan = model.placement.plan
    if model.on_gpu is not None:
        tiers = _of_gpu(model.on_gpu.placement, session)
    else:
        tiers = [Tier("RAM: weights", plan.trunk, plan.trunk)]
    routed = plan.parts.get(ROUTED, 0)
    if routed:
        tiers.append(_experts_in_memory(model, routed, resident))
    if model.on_gpu is None:
        tiers.append(_latent_cache("RAM", session, plan.cache))
    if routed:
        tiers.append(Tier("disk", _bytes_on_disk(model, resident), routed))
    process = process_bytes()
    if process is not None:
        tiers.append(Tier("process", process, model.budget))
    return tuple(tiers)


def _of_gpu(placement: GpuPlacement, session: Session | None) -> list[Tier]:
    tiers = [Tier("GPU: weights", placement.weights, placement.weights)]
    if placement.slots:
        tiers.append(Tier("GPU: experts", placement.pool, placement.pool))
    return [*tiers, _latent_cache("GPU", session, placement.cache)]


def _experts_in_memory(model: Model, routed: int, resident: NDArray[np.bool_] | None) -> Tier:
    name = "RAM: experts"
    if model.experts is None or resident is None:
        return Tier(name, routed, routed)
    slot = model.placement.slot_bytes
    return Tier(name, int(resident.sum()) * slot, model.experts.native.slots * slot)


def _latent_cache(place: str, session: Session | None, planned: int) -> Tier:
    name = f"{place}: latent cache"
    if session is None:
        return Tier(name, 0, planned)
    cache = session._cache
    per_token = len(cache.layers) * cache.row_bytes
    return Tier(name, cache.length * per_token, cache.capacity * per_token)


def _bytes_on_disk(model: Model, resident: NDArray[np.bool_] | None) -> int:
    if model.experts is None or resident is None:
        return 0
    missing = (~resident).sum(axis=1)
    return sum(
        int(n) * nbytes for n, nbytes in zip(missing, model.experts.expert_bytes, strict=True)
    )


def process_bytes() -> int | None:
    """Bytes of memory that this process holds, pages of files included.

    None where the system does not say (macOS).
    """
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except OSError:
        return None
    return pages * mmap.PAGESIZE

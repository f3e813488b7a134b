"""Small models whose experts stay on disk, in as many slots as a test wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import localds
from localds import models
from localds.gguf import GGUFFile
from localds.memory.placement import slot_bytes
from localds.memory.plan import make_plan
from localds.session import DEFAULT_CONTEXT

if TYPE_CHECKING:
    from pathlib import Path

    from localds.model import Model


def budget_for(path: Path, slots: int, context: int = DEFAULT_CONTEXT) -> int:
    """Bytes that leave room for exactly so many slots."""
    with GGUFFile.open(path) as gguf:
        geometry = models.read_geometry(gguf)
        plan = make_plan(gguf, geometry, context)
        trunk = plan.weights - plan.parts["routed experts"]
        return trunk + plan.cache + plan.runtime + slots * slot_bytes(gguf, geometry)


def load_offloaded(path: Path, slots: int) -> Model:
    """The model with `slots` slots, none of them filled yet."""
    model = localds.load(path, ram=budget_for(path, slots))
    assert model.offload is not None
    assert model.placement.slots == slots
    model.offload.store.wait_warm()
    return model

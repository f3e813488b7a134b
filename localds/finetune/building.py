"""The model of a plan on its device, and the end of what serves it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import mlx.core as mx

from localds import models
from localds.finetune.model import TrainModel
from localds.finetune.model.offloaded_layers import offloaded_experts
from localds.finetune.model.offloaded_model import OffloadedModel
from localds.memory.gpu_plan import host_plan
from localds.memory.machine import budget_for
from localds.memory.offload import Offload
from localds.memory.placement import place
from localds.memory.plan import make_plan

if TYPE_CHECKING:
    from types import TracebackType

    from localds.finetune.options import Options
    from localds.finetune.plan import TrainPlan
    from localds.gguf import GGUFFile
    from localds.memory.experts import ExpertStore
    from localds.memory.placement import Placement
    from localds.models.geometry import Geometry
    from localds.ops.mlx.backend import Backend


class Build:
    """Loads the model of `plan` where a `with` begins; threads and memory limits end with it."""

    def __init__(
        self,
        gguf: GGUFFile,
        options: Options,
        plan: TrainPlan,
        backend: Backend,
        stream: mx.Stream,
    ) -> None:
        self._gguf = gguf
        self._options = options
        self._plan = plan
        self._backend = backend
        self._stream = stream
        self._stack = ExitStack()

    def __enter__(self) -> TrainModel:
        with ExitStack() as stack:
            self._limit(stack)
            model = self._resident() if self._plan.resident else self._offloaded(stack)
            self._stack = stack.pop_all()
            return model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        mx.clear_cache()

    def _limit(self, stack: ExitStack) -> None:
        """Keep MLX within the budget, the memory that it holds for later use included."""
        if self._plan.budget is not None:
            stack.callback(mx.set_memory_limit, mx.set_memory_limit(self._plan.budget))
        stack.callback(mx.set_cache_limit, mx.set_cache_limit(self._plan.peak))

    def _resident(self) -> TrainModel:
        return TrainModel(
            self._gguf,
            self._options.adapter,
            self._backend,
            self._stream,
            checkpointing=self._plan.checkpointing,
        )

    def _offloaded(self, stack: ExitStack) -> TrainModel:
        experts = offloaded_experts(
            models.read_geometry(self._gguf),
            self._backend,
            slots=self._plan.slots,
            staging_bytes=self._plan.staging,
            store=self._store(stack),
        )
        stack.callback(experts.close)
        model = OffloadedModel(
            self._gguf,
            self._options.adapter,
            self._backend,
            self._stream,
            experts,
            checkpointing=self._plan.checkpointing,
        )
        stack.callback(model.close)
        return model

    def _store(self, stack: ExitStack) -> ExpertStore | None:
        """Where experts are read from; None for the file's map, if RAM holds all of them."""
        geometry = models.read_geometry(self._gguf)
        placement = host_placement(self._gguf, geometry, self._plan, self._options.ram)
        if placement.resident:
            return None
        offload = Offload(self._gguf, geometry, placement)
        stack.callback(offload.close)
        offload.start(None)
        return offload.store


def host_placement(
    gguf: GGUFFile, geometry: Geometry, plan: TrainPlan, ram: int | str | None
) -> Placement:
    """Where experts that are not on the device lie in `ram`; raises `BudgetError` for too little.

    Of memory that the device shares, what the plan takes is gone.
    """
    host = host_plan(make_plan(gguf, geometry, 1), gguf, geometry, plan.slots, plan.staging)
    budget = budget_for(ram)
    if budget is not None and plan.unified:
        budget -= plan.total
    return place(gguf, geometry, host, budget)

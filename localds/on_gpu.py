"""The part of a model that lies on a GPU, from its plan to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds.memory.gpu_plan import (
    check_gpu_options,
    place_beside_gpu,
    place_on_gpu,
    vram_bytes,
)
from localds.memory.plan import BudgetError
from localds.memory.speeds import known_speeds, speeds_for
from localds.ops import ExpertLayer
from localds.ops.cpu import CpuOps
from localds.ops.mlx_device import NoGpuError, find_gpu, open_gpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from localds.gguf import GGUFFile
    from localds.memory.experts import ExpertStore
    from localds.memory.gpu_plan import GpuPlacement
    from localds.memory.placement import Placement
    from localds.memory.plan import Plan
    from localds.memory.speeds import Speeds
    from localds.models.geometry import Geometry
    from localds.ops.mlx.decoder import MlxDecoder
    from localds.ops.mlx.split import SplitMoe
    from localds.ops.mlx.splitting import Split
    from localds.ops.mlx_device import Gpu

DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """How much of a GPU to use, as the user said: see `localds.load`."""

    vram: int | str | None = None
    cpu_moe: bool = False
    n_cpu_moe: int | None = None

    def given(self) -> str | None:
        """The name of an option that differs from its default."""
        default = GpuOptions()
        names = ("vram", "cpu_moe", "n_cpu_moe")
        return next((n for n in names if getattr(self, n) != getattr(default, n)), None)


def choose_gpu(device: str, options: GpuOptions) -> Gpu | None:
    """The GPU to compute on, None for the CPU.

    Raises `ValueError` for a device that is none of `DEVICES` and for options that do not go with
    it, `NoGpuError`, a `ValueError`, where there is no GPU and one is wanted.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is unknown; choose {', '.join(DEVICES)}")
    gpu = None
    if device != "cpu":
        try:
            gpu = find_gpu()
        except NoGpuError as error:
            if device == "gpu":
                raise
            if given := options.given():
                raise NoGpuError(f"{given} needs a GPU: {error}") from error
    check_gpu_options(gpu is not None, options.vram, options.cpu_moe, options.n_cpu_moe)
    return gpu


class OnGpu:
    """A model's weights and rows on a GPU: planned when this is made, brought there by `build`.

    `ram` are the bytes of the machine's memory that the model may take, None where nobody knows.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        geometry: Geometry,
        gpu: Gpu,
        options: GpuOptions,
        plan: Plan,
        *,
        chunk: int,
        cache_type: str,
        ram: int | None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Plan for a session of `plan`, with `ram` bytes of the machine's memory beside.

        Where experts have to be divided, the machine's speeds are measured, once; `on_note` is told
        before. Raises `BudgetError` for what does not fit, `ValueError` for the options.
        """
        self.gpu = gpu
        self._gguf = gguf
        self._geometry = geometry
        self._options = options
        self._plan = plan
        self._run = chunk, cache_type
        self.ram = ram
        self._backend, self._stream = open_gpu(gpu)
        self._decoder: MlxDecoder | None = None
        self._split: Split | None = None
        self._speeds = known_speeds(gpu, gguf.paths)
        self.placement: GpuPlacement = self._place()
        known = self._speeds
        if not self.placement.resident and (known is None or known.disk_bytes_per_second is None):
            self._speeds = speeds_for(gpu, gguf.paths, on_note)
            self.placement = self._place()

    @property
    def speeds(self) -> Speeds | None:
        """The machine's, if they are known."""
        return self._speeds

    def measured_speeds(self) -> Speeds:
        """The machine's, which takes 3 s where they are not known.

        Raises `ReadError`, an `OSError`, where the disk fails.
        """
        if self._speeds is None:
            self._speeds = speeds_for(self.gpu, self._gguf.paths)
        return self._speeds

    def beside(self, ram: int | None, *, pooled: bool = False) -> Placement:
        """What lies in `ram` bytes of the machine's memory; `pooled` as in `place`.

        Raises `BudgetError` where that is too little.
        """
        self.ram = ram
        return place_beside_gpu(
            self._gguf, self._geometry, self._plan, self.placement, ram, pooled=pooled
        )

    def plan_again(self, plan: Plan, chunk: int, cache_type: str) -> None:
        """Make room for another session beside the weights; raises `BudgetError`."""
        before = self._plan, self._run
        self._plan, self._run = plan, (chunk, cache_type)
        try:
            self.placement = self._place(slots=self.placement.slots)
        except BudgetError:
            self._plan, self._run = before
            raise

    def build(
        self,
        store: ExpertStore | None,
        usage: NDArray[np.uint32] | None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> MlxDecoder:
        """Bring the weights to the GPU. The host's experts come from `store`, if there is one.

        `usage` uint32 [layers, experts] are uses in earlier runs; `on_progress(done, total)` counts
        bytes. Raises `GGUFError` for what does not fit together, `ReadError` where the disk fails.
        """
        import mlx.core as mx

        from localds.ops.mlx import build_decoder
        from localds.ops.mlx.splitting import Split

        # Freed memory is kept by MLX, which must not go beyond the budget with it.
        mx.set_memory_limit(self.placement.budget)
        mx.set_cache_limit(self.placement.scratch)
        if not self.placement.resident:
            self._split = Split(
                backend=self._backend,
                slots=self.placement.slots,
                cpu=CpuOps(experts=store),
                staging_bytes=self.placement.staging,
                stream_from=self.placement.stream_from,
                adopt=self.gpu.unified,
                store=store,
                usage=usage,
            )
        self._decoder = build_decoder(
            self._gguf, self._backend, self._stream, self._split, on_progress
        )
        return self._decoder

    def left_to_host(self, usage: NDArray[np.uint32] | None) -> NDArray[np.uint32]:
        """Which experts a pool beside the GPU wants most, as uses: none of those that lie there."""
        resident = self.resident()
        counts = np.ones(resident.shape, np.uint32) if usage is None else usage + 1
        return np.where(resident, 0, counts).astype(np.uint32)

    def hits(self) -> tuple[int, int]:
        """Of the experts that tokens used, how many lay on the GPU, and how many there were."""
        divided = list(self._divided().values())
        uses = sum(int(count.sum()) for count in self._uses())
        missed = sum(int(layer.uses().sum()) - layer.hits for layer in divided)
        return uses - missed, uses

    def resident(self) -> NDArray[np.bool_]:
        """Which experts lie on the GPU, bool [layers, experts]."""
        found = np.ones((len(self.placement.slots), self.placement.experts), np.bool_)
        for number, layer in self._divided().items():
            found[number] = layer.slots.of >= 0
        return found

    def usage(self) -> NDArray[np.uint32]:
        """Uses of late, uint32 [layers, experts]; all since the start of layers that are whole."""
        counts = self._uses()
        for number, layer in self._divided().items():
            counts[number] = layer.hot.scores.astype(np.uint64)
        return np.stack(counts).astype(np.uint32)

    def close(self) -> None:
        """Give the GPU's memory back, as far as nobody else holds on to the model."""
        import mlx.core as mx

        if self._split is not None:
            self._split.stager.close()
        self._decoder = self._split = None
        mx.set_cache_limit(0)  # what is freed from now on serves others

    def _uses(self) -> list[NDArray[np.uint64]]:
        layers = [] if self._decoder is None else self._decoder.layers
        forwards = (layer.feed_forward for layer in layers)
        return [forward.uses() for forward in forwards if isinstance(forward, ExpertLayer)]

    def _divided(self) -> dict[int, SplitMoe]:
        return {} if self._split is None else self._split.layers

    def _place(self, slots: tuple[int, ...] | None = None) -> GpuPlacement:
        chunk, cache_type = self._run
        return place_on_gpu(
            self._gguf,
            self._geometry,
            self._plan,
            self.gpu,
            vram_bytes(self._options.vram),
            device_bytes=self._backend.device_bytes,
            chunk=chunk,
            cache_type=cache_type,
            ram=self.ram,
            cpu_moe=self._options.cpu_moe,
            n_cpu_moe=self._options.n_cpu_moe,
            slots=slots,
            speeds=self._speeds,
        )

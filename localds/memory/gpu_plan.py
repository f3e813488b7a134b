"""Where the weights of a model on a GPU go: into its memory, beside it into RAM, or on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from localds.memory.gpu_fit import Needs, Room, most_slots, what_would_fit, without_first
from localds.memory.gpu_sizes import Pass, device_sizes
from localds.memory.gpu_speed import stream_from
from localds.memory.placement import place, routed_tensors, slot_bytes
from localds.memory.plan import ROUTED, BudgetError
from localds.units import format_size, parse_size

if TYPE_CHECKING:
    from localds.gguf import GGUFFile
    from localds.memory.gpu_sizes import DeviceBytes
    from localds.memory.placement import Placement
    from localds.memory.plan import Plan
    from localds.memory.speeds import Speeds
    from localds.models.geometry import Geometry
    from localds.ops.mlx_device import Gpu

# Left to the desktop and to allocators that round up. Memory that is the machine's own serves every
# program, and the system begins to move others' to disk before all of it is taken.
_LEAST_LEFT = {False: 512 << 20, True: 1 << 30}
_SHARE_LEFT = {False: 0.06, True: 0.12}


@dataclass(frozen=True, slots=True)
class GpuPlacement:
    """What lies on a GPU. Sizes in bytes.

    `weights` are everything but the routed experts (of which a token reads `active_trunk`), `cache`
    the rows of a full context, `scratch` what a pass takes at most. Of each layer with experts, in
    order, `slots` of its `experts` lie on the device; one takes `expert_bytes`. Others are brought
    there through `staging` bytes, for prompts of `stream_from` tokens at once and more; None for
    never. `unified` memory is the machine's own.
    """

    gpu: str
    unified: bool
    budget: int
    weights: int
    active_trunk: int
    cache: int
    scratch: int
    slots: tuple[int, ...]
    experts: int
    expert_bytes: tuple[int, ...]
    staging: int
    stream_from: int | None

    @property
    def resident(self) -> bool:
        """Whether all of the model lies on the device."""
        return all(count == self.experts for count in self.slots)

    @property
    def pool(self) -> int:
        """Bytes of the experts on the device."""
        return sum(n * b for n, b in zip(self.slots, self.expert_bytes, strict=True))

    @property
    def total(self) -> int:
        """Bytes on the device with a full context."""
        return self.weights + self.cache + self.scratch + self.pool + self.staging


def check_gpu_options(
    on_gpu: bool,
    vram: int | str | None,
    cpu_moe: bool,
    n_cpu_moe: int | None,
) -> None:
    """Raise `ValueError` for options that exclude each other, or say nothing to the CPU."""
    if cpu_moe and n_cpu_moe is not None:
        raise ValueError(
            "cpu_moe keeps the experts of all layers off the GPU, n_cpu_moe those of some; "
            "give one of them"
        )
    if n_cpu_moe is not None and n_cpu_moe < 0:
        raise ValueError(f"n_cpu_moe is {n_cpu_moe}; it must be at least 0")
    if on_gpu:
        return
    if vram is not None:
        raise ValueError("vram is a limit on GPU memory, but the device is the CPU; leave it out")
    if cpu_moe or n_cpu_moe is not None:
        name = "cpu_moe" if cpu_moe else "n_cpu_moe"
        raise ValueError(
            f"{name} keeps experts off the GPU, but the device is the CPU; leave it out"
        )


def vram_bytes(vram: int | str | None) -> int | None:
    """Bytes that `vram` stands for: a number of them, a size like "8GiB", None for the default.

    Raises `ValueError` for a text that is no size.
    """
    return parse_size(vram) if isinstance(vram, str) else vram


def place_on_gpu(
    gguf: GGUFFile,
    geometry: Geometry,
    plan: Plan,
    gpu: Gpu,
    vram: int | None,
    *,
    device_bytes: DeviceBytes,
    chunk: int,
    cache_type: str = "f16",
    ram: int | None = None,
    cpu_moe: bool = False,
    n_cpu_moe: int | None = None,
    slots: tuple[int, ...] | None = None,
    speeds: Speeds | None = None,
) -> GpuPlacement:
    """Decide what of a model lies on `gpu`.

    `vram` bytes of its memory may be taken, None for what is free less a reserve; `ram` bytes of
    the machine's, None where nobody knows. `device_bytes(type, bytes in the file)` tells what
    weights take on the device. As many experts lie there as fit; with `cpu_moe` none, with
    `n_cpu_moe` all but those of the first so many layers, and with `slots`, those of a model that
    is there already, as many as it has. Without `speeds`, none of the others are brought there for
    long prompts, unless memory is unified.

    Raises `BudgetError` where not even the trunk fits, or `slots` do not, and `ValueError` for the
    options.
    """
    check_gpu_options(True, vram, cpu_moe, n_cpu_moe)
    sizes = device_sizes(gguf, geometry, gpu, device_bytes)
    room = Room(
        gpu_budget(gpu, vram),
        ram if gpu.unified else None,
        plan.runtime,
        sizes.staging + _least_pool(gguf, geometry),
    )
    needs = Needs(sizes, geometry, plan, Pass(chunk, cache_type))
    if slots is None:
        slots = _choose_slots(needs, room, cpu_moe, n_cpu_moe)
    if not needs.fit(slots, room):
        raise BudgetError(what_would_fit(needs, slots, room, gpu))
    split = needs.is_split(slots)
    streamed = None
    if split and gpu.unified:
        streamed = 1
    elif split:
        share = _disk_share(needs, slots, ram)
        used = geometry.experts_used
        streamed = stream_from(sizes, slots, used, needs.run.chunk, speeds, share)
    return GpuPlacement(
        gpu=gpu.name,
        unified=gpu.unified,
        budget=room.budget(split=split),
        weights=sizes.trunk,
        active_trunk=sizes.active_trunk,
        cache=plan.cache,
        scratch=needs.scratch(slots, plan.context),
        slots=slots,
        experts=sizes.experts,
        expert_bytes=sizes.expert_bytes,
        staging=sizes.staging if split else 0,
        stream_from=streamed,
    )


def host_plan(
    plan: Plan, gguf: GGUFFile, geometry: Geometry, slots: tuple[int, ...], staging: int
) -> Plan:
    """What is left for RAM and disk: experts of layers that are not wholly on the device.

    All of a layer's, since those on the device change with what is used. What is on its way to the
    device lies in RAM as well.
    """
    layers = routed_tensors(gguf, geometry)
    on_device = {
        block for block, count in zip(layers, slots, strict=True) if count == geometry.experts
    }
    routed = sum(t.nbytes for block in layers if block not in on_device for t in layers[block])
    return replace(
        plan,
        parts={ROUTED: routed} if routed else {},
        cache_per_token=0,
        runtime=plan.runtime + staging,
        on_device=frozenset(on_device),
    )


def place_beside_gpu(
    gguf: GGUFFile,
    geometry: Geometry,
    plan: Plan,
    placement: GpuPlacement,
    ram: int | None,
    *,
    pooled: bool = False,
) -> Placement:
    """Decide what lies in `ram` bytes beside the GPU, None for as many as it takes.

    Unified memory holds what the GPU has as well. There no more experts lie in RAM than are on
    their way: others would take the place of some that the GPU has at hand. With `pooled`, experts
    lie in a pool even where all of them fit. Raises `BudgetError` where not even these fit.
    """
    host = host_plan(plan, gguf, geometry, placement.slots, placement.staging)
    if not placement.unified:
        return place(gguf, geometry, host, ram, pooled=pooled)
    left = None if ram is None else ram - placement.total
    if placement.resident:
        return place(gguf, geometry, host, left)
    least = host.runtime + _least_pool(gguf, geometry)
    return place(gguf, geometry, host, least if left is None else min(left, least), pooled=True)


def describe_gpu(placement: GpuPlacement, tokens_per_second: float | None = None) -> str:
    """What lies where, in one line, or two with the expected speed."""
    parts = [
        f"trunk {format_size(placement.weights)}",
        f"cache {format_size(placement.cache)}",
    ]
    after = ""
    if placement.slots:
        on_device, all_of_them = sum(placement.slots), len(placement.slots) * placement.experts
        count = "all" if placement.resident else f"{on_device:,} of"
        parts.append(f"{count} {all_of_them:,} experts ({format_size(placement.pool)})")
    if not placement.resident:
        after = "; the others come to it when they are needed"
        if not placement.unified:
            after = "; the others on the CPU"
            if placement.stream_from is not None:
                after += (
                    f"; prompts of {placement.stream_from} tokens and more bring them to the GPU"
                )
    text = f"GPU {placement.gpu}: {', '.join(parts)}{after}"
    if tokens_per_second is not None:
        text += f"\nat most {tokens_per_second:.3g} tokens/s are expected"
    return text


def _choose_slots(
    needs: Needs, room: Room, cpu_moe: bool, n_cpu_moe: int | None
) -> tuple[int, ...]:
    """Slots of each layer; none where not even these fit. Raises `BudgetError`."""
    if cpu_moe:
        return needs.equal(0)
    return most_slots(needs, room) if n_cpu_moe is None else without_first(needs, room, n_cpu_moe)


def gpu_budget(gpu: Gpu, vram: int | None) -> int:
    """Bytes of the GPU's memory that may be taken."""
    if vram is None:
        kept = max(_LEAST_LEFT[gpu.unified], int(gpu.total_bytes * _SHARE_LEFT[gpu.unified]))
        return max(gpu.free_bytes - kept, 0)
    free = f"{format_size(gpu.free_bytes)} of {format_size(gpu.total_bytes)} are free"
    if vram > gpu.total_bytes:
        raise BudgetError(
            f"vram is {format_size(vram)}, more than {gpu.name} has: {free}; give less"
        )
    if vram > gpu.free_bytes:
        raise BudgetError(
            f"vram is {format_size(vram)}, more than {gpu.name} has to give: {free}; "
            "give less, or end other programs that use it"
        )
    return vram


def _least_pool(gguf: GGUFFile, geometry: Geometry) -> int:
    """Bytes of the smallest pool of experts that a model runs with."""
    return 3 * geometry.experts_used * slot_bytes(gguf, geometry)


def _disk_share(needs: Needs, slots: tuple[int, ...], ram: int | None) -> float:
    """The share of the host's experts that does not fit in `ram`."""
    sizes = needs.sizes
    layers = zip(slots, sizes.expert_file_bytes, strict=True)
    wanted = sum(sizes.experts * nbytes for count, nbytes in layers if count < sizes.experts)
    if ram is None:
        return 0.0
    return min(max(1 - (ram - needs.plan.runtime - sizes.staging) / wanted, 0.0), 1.0)

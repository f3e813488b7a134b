"""The device that a model is trained on, and how much of its memory may be taken."""

from __future__ import annotations

from importlib.util import find_spec

from localds.memory.gpu_plan import gpu_budget, vram_bytes
from localds.memory.machine import available_memory, budget_for, total_memory
from localds.ops.mlx_device import Gpu, NoGpuError, check_mlx, find_gpu

DEVICES = ("auto", "cpu", "gpu")
_CPU = "the CPU"


class NoMlxError(ValueError):
    """Training needs MLX: what to install."""


def find_device(device: str) -> Gpu:
    """The GPU, or MLX's CPU device: for "auto" where there is no GPU.

    Raises `NoMlxError` without MLX, `NoGpuError` for "gpu" where there is none, `ValueError` for
    an unknown device.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is unknown; choose {', '.join(DEVICES)}")
    if find_spec("mlx") is None:
        raise NoMlxError(
            "training needs MLX, which is not installed: pip install 'localds[finetune]', or with "
            "an NVIDIA card 'localds[cuda]'"
        )
    check_mlx()
    if device != "cpu":
        try:
            return find_gpu()
        except NoGpuError:
            if device == "gpu":
                raise
    total = total_memory() or 0
    free = available_memory()
    return Gpu(_CPU, "cpu", total, total if free is None else min(free, total), unified=True)


def device_budget(gpu: Gpu, vram: int | str | None, ram: int | str | None) -> int | None:
    """Bytes that training may take on the device; None where nobody knows.

    Of a GPU `vram` bytes, or what is free less a reserve; where its memory is the machine's, no
    more than `ram` or what is free of that. On the CPU it is that alone. Raises `BudgetError` for
    more than there is, `ValueError` for a text that is no size.
    """
    if gpu.name == _CPU:  # and no stand-in for a GPU
        if vram is not None:
            raise ValueError(
                "vram is a limit on GPU memory, but the device is the CPU; leave it out, or give "
                "ram"
            )
        return budget_for(ram)
    found: int = gpu_budget(gpu, vram_bytes(vram))
    of_machine = budget_for(ram) if gpu.unified else None
    return found if of_machine is None else min(found, of_machine)

"""What `localds doctor` finds out: the machine, the GPU and MLX, folders and problems."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from localds import __version__, _native
from localds.hub.cache import cache_root
from localds.memory.machine import (
    available_memory,
    default_budget,
    processor_name,
    total_memory,
)
from localds.ops.mlx_device import (
    VARIABLE,
    Gpu,
    NoGpuError,
    check_mlx,
    failed_kernels,
    find_gpu,
)
from localds.ops.mlx_install import clash, installed
from localds.ops.nvidia import Driver, nvidia_driver
from localds.settings import cache_folder, config_folder, state_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. `isas` are the instruction sets with kernels that it has, `isa` is used."""

    name: str
    cores: int | None
    threads: int
    isas: list[str]
    isa: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of RAM that this process could have, may still take, and takes unless told otherwise.

    None where the system does not say.
    """

    total_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None


@dataclass(frozen=True, slots=True)
class Mlx:
    """MLX's packages, and what the one that is loaded computes on: CPU, CUDA or Metal.

    None where it cannot be loaded.
    """

    packages: list[str]
    build: str | None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of localds, which need not exist, and the bytes free on its disk."""

    purpose: str
    path: str
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """The whole of it, the measured speeds apart.

    `no_gpu` is why there is no `gpu`. `failed_kernels` are those of localds that do not work on
    the GPU, and why; None without a GPU that there are any for. `problems` can be mended, each by
    the remedy that it names; to have no GPU is none.
    """

    localds: str
    python: str
    system: str
    cpu: Cpu
    memory: Memory
    gpu: Gpu | None
    architecture: str | None
    no_gpu: str | None
    nvidia_driver: Driver | None
    mlx: Mlx | None
    failed_kernels: Mapping[str, str] | None
    folders: list[Folder]
    problems: list[str]


def examine() -> Report:
    """Look at everything. Raises `ValueError` for an unknown value of LOCALDS_GPU."""
    gpu, no_gpu = _gpu()
    failed = failed_kernels(gpu) if gpu else None
    return Report(
        localds=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpu(),
        memory=Memory(total_memory(), available_memory(), default_budget()),
        gpu=gpu,
        architecture=_architecture(gpu),
        no_gpu=no_gpu,
        nvidia_driver=nvidia_driver(),
        mlx=_mlx(),
        failed_kernels=failed,
        folders=[
            _folder("settings", config_folder()),
            _folder("chats", state_folder()),
            _folder("cache", cache_folder()),
            _folder("models", cache_root()),
        ],
        problems=list(_problems(no_gpu, failed)),
    )


def existing(folder: Path) -> Path:
    """`folder`, or its nearest ancestor that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _problems(no_gpu: str | None, failed: Mapping[str, str] | None) -> Iterator[str]:
    problem = clash()
    if problem:
        yield problem
    if no_gpu and not problem and VARIABLE not in os.environ and _could_have_gpu():
        yield f"the GPU is not used: {no_gpu}"
    if failed:
        yield (
            f"{len(failed)} of localds's kernels do not work on this GPU, and MLX's operations do "
            "their work, more slowly; please report it with the output of `localds doctor --json`"
        )


def _could_have_gpu() -> bool:
    """Whether there is a GPU, or somebody installed MLX for one."""
    driver, mlx = nvidia_driver(), _mlx()
    return bool(driver and driver.devices) or (mlx is not None and mlx.build is None)


def _gpu() -> tuple[Gpu | None, str | None]:
    """The GPU, or why there is none."""
    try:
        return find_gpu(), None
    except NoGpuError as error:
        return None, str(error)


def _architecture(gpu: Gpu | None) -> str | None:
    if gpu is None:
        return None
    import mlx.core as mx

    return str(mx.device_info(mx.cpu if gpu.kind == "cpu" else mx.gpu)["architecture"])


def _mlx() -> Mlx | None:
    if find_spec("mlx") is None:
        return None
    packages = [str(package) for package in installed()]
    try:
        check_mlx()
    except NoGpuError:
        return Mlx(packages, None)
    import mlx.core as mx

    if mx.cuda.is_available():
        return Mlx(packages, "CUDA")
    return Mlx(packages, "Metal" if mx.metal.is_available() else "CPU")


def _cpu() -> Cpu:
    return Cpu(
        name=processor_name() or platform.machine(),
        cores=_native.physical_cores("") or None,
        threads=_native.threads(),
        isas=_native.available_isas(),
        isa=_native.isa(),
    )


def _folder(purpose: str, path: Path) -> Folder:
    return Folder(purpose, str(path), shutil.disk_usage(existing(path)).free)

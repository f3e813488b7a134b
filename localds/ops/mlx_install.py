"""Which of MLX's builds are installed, and how to mend what is wrong with them.

MLX is the package `mlx` and, on Linux, one of three builds of its library. Each of these brings
the same file, mlx/lib/libmlx.so: the one installed last wins, and uninstalling either of two takes
it away from both.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from localds.ops.nvidia import cuda_version

_LEAST, _BELOW = (0, 32, 4), (0, 33)
BOUNDS = f">={'.'.join(map(str, _LEAST))},<{'.'.join(map(str, _BELOW))}"
"""The versions of MLX that localds works with; pyproject.toml says the same."""

BUILDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
"""The builds for Linux."""


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def installed() -> list[Package]:
    """MLX's packages in this environment, `mlx` first; empty without MLX."""
    found = []
    for name in ("mlx", "mlx-metal", *BUILDS):
        try:
            found.append(Package(name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def installed_builds() -> list[Package]:
    """Those of `installed` that share libmlx.so."""
    return [package for package in installed() if package.name in BUILDS]


def clash() -> str | None:
    """What to tell a person who has several builds over each other, otherwise None."""
    builds = installed_builds()
    if len(builds) < 2:
        return None
    wanted = _wanted_build() if cuda_version() else "mlx-cpu"
    kept = next((build for build in builds if build.name == wanted), builds[-1])
    others = " ".join(build.name for build in builds if build is not kept)
    return (
        f"{' and '.join(map(str, builds))} are installed over each other and share files; "
        f"keep one: pip uninstall -y {others} && {_reinstall(kept)}"
    )


def wrong_version() -> str | None:
    """What to tell a person whose MLX is not one that localds works with, otherwise None."""
    try:
        found = Package("mlx", version("mlx"))
    except PackageNotFoundError:
        return None
    if _LEAST <= _numbers(found.version) < _BELOW:
        return None
    return f"{found} is installed, and localds works with mlx{BOUNDS}; {how_to_install()}"


def how_to_install() -> str:
    """What installs MLX with this machine's GPU."""
    if sys.platform == "darwin":
        return f"pip install 'mlx{BOUNDS}'"
    return f"pip install 'mlx[{_wanted_build().removeprefix('mlx-').replace('-', '')}]{BOUNDS}'"


def why_broken(error: Exception) -> str:
    """What to tell a person for whom `import mlx.core` raised `error`."""
    builds, names = installed_builds(), [package.name for package in installed()]
    if "libcuda.so" in str(error):
        remedy = "its CUDA build needs NVIDIA's driver; install that"
    elif problem := clash():
        remedy = problem
    elif "mlx" not in names or (sys.platform == "linux" and not builds):
        remedy = f"a part of it is missing; {how_to_install()}"
    elif "libmlx.so" in str(error):
        remedy = f"a part of it is missing; {_reinstall(builds[0])}"
    else:
        exact = " ".join(f"{package.name}=={package.version}" for package in installed())
        remedy = f"install it again: pip install --force-reinstall {exact}"
    return f"MLX is installed but cannot be loaded ({error}): {remedy}"


def why_no_gpu() -> str:
    """What to tell a person whose MLX loads and finds no GPU."""
    builds = installed_builds()
    if problem := clash():
        return f"MLX finds no GPU: {problem}"
    if not builds:
        return "the MLX that is installed finds no GPU"
    if builds[0].name == "mlx-cpu":
        return (
            "the MLX that is installed computes on the CPU alone (mlx-cpu); for an NVIDIA card, "
            f"replace it: pip uninstall -y mlx-cpu && {how_to_install()}"
        )
    cuda = cuda_version()
    if cuda and cuda < (13, 0) and builds[0].name == "mlx-cuda-13":
        return (
            f"{builds[0]} is too new for NVIDIA's driver, which is made for CUDA "
            f"{cuda[0]}.{cuda[1]}; update the driver, or: pip uninstall -y "
            f"{builds[0].name} && {how_to_install()}"
        )
    return f"{builds[0]} finds no GPU; see whether `nvidia-smi` lists one"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 32, 4) of "0.32.4.dev1"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _wanted_build() -> str:
    """The build for NVIDIA's driver here, or for a current one."""
    cuda = cuda_version()
    return "mlx-cuda-12" if cuda and cuda < (13, 0) else "mlx-cuda-13"


def _reinstall(build: Package) -> str:
    """The command that brings a build's files back."""
    return f"pip install --force-reinstall --no-deps {build.name}=={build.version}"

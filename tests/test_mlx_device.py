"""Finding a GPU: what is said of it, and of what is missing, with MLX and its packages faked."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement

from localds.memory.machine import total_memory
from localds.ops import mlx_device, mlx_install, nvidia
from localds.ops.mlx_device import Gpu, NoGpuError, check_mlx, find_gpu, open_gpu
from localds.ops.mlx_install import clash
from localds.ops.nvidia import Driver, nvidia_driver

if TYPE_CHECKING:
    from collections.abc import Callable

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

GIB = 1 << 30
CPU_ONLY = {"mlx": "0.32.4", "mlx-cpu": "0.32.4"}
BOTH = CPU_ONLY | {"mlx-cuda-13": "0.32.4"}
CUDA_13 = {"mlx": "0.32.4", "mlx-cuda-13": "0.32.4"}

CUDA_INFO = {
    "device_name": "NVIDIA GeForce RTX 4090",
    "architecture": "sm_89",
    "total_memory": 24 * GIB,
    "free_memory": 22 * GIB,
}
METAL_INFO = {
    "device_name": "Apple M3 Max",
    "architecture": "applegpu_g15s",
    "memory_size": 64 * GIB,
    "max_recommended_working_set_size": 48 * GIB,
}


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALDS_GPU", raising=False)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets which packages are installed, and which driver."""

    def install(versions: dict[str, str], driver: Driver | None = None) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(mlx_install, "version", version)
        monkeypatch.setattr(mlx_install, "cuda_version", lambda: driver and driver.cuda)
        monkeypatch.setattr(sys, "platform", "linux")

    return install


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], *, cuda: bool) -> None:
    """Have MLX find a GPU, which computes as its CPU device does."""
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    monkeypatch.setattr(mx, "device_info", lambda _: info)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)


# ---- a GPU ----


def test_a_card_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, CUDA_INFO, cuda=True)
    expected = Gpu("NVIDIA GeForce RTX 4090", "cuda", 24 * GIB, 22 * GIB, unified=False)
    assert find_gpu() == expected


@pytest.mark.parametrize(
    ("available", "free"), [(None, 48 * GIB), (10 * GIB, 10 * GIB), (60 * GIB, 48 * GIB)]
)
def test_a_mac_has_what_metal_recommends(
    monkeypatch: pytest.MonkeyPatch, available: int | None, free: int
) -> None:
    pretend_gpu(monkeypatch, METAL_INFO, cuda=False)
    monkeypatch.setattr(mlx_device, "available_memory", lambda: available)
    assert find_gpu() == Gpu("Apple M3 Max", "metal", 48 * GIB, free, unified=True)


def test_a_gpu_that_does_not_compute_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, CUDA_INFO, cuda=True)

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises(NoGpuError, match=r"not compute \(no kernel image is available\); it needs"):
        find_gpu()


# ---- the variable ----


@pytest.mark.parametrize(("value", "unified"), [("cpu", False), ("cpu-unified", True)])
def test_a_stand_in_computes(monkeypatch: pytest.MonkeyPatch, value: str, unified: bool) -> None:
    monkeypatch.setenv("LOCALDS_GPU", value)
    gpu = find_gpu()
    assert gpu.kind == "cpu"
    assert gpu.unified is unified
    assert gpu.total_bytes == total_memory()
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    _, stream = open_gpu(gpu)
    sums = []

    def compute() -> None:
        with mx.stream(stream):
            sums.append((mx.arange(5) + 1).sum().item())

    for _ in range(2):  # one thread after another, on the same stream
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert sums == [15, 15]


def test_each_kind_has_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    names = {kind: type(open_gpu(Gpu("", kind, 0, 0, False))[0]).__name__ for kind in KINDS}
    assert names == KINDS


KINDS = {"cuda": "CudaBackend", "metal": "MetalBackend", "cpu": "Portable"}


def test_a_gpu_can_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, CUDA_INFO, cuda=True)
    monkeypatch.setenv("LOCALDS_GPU", "none")
    with pytest.raises(NoGpuError, match="hidden by LOCALDS_GPU=none"):
        find_gpu()


def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDS_GPU", "cuda")
    with pytest.raises(ValueError, match="LOCALDS_GPU='cuda' is not one of cpu, cpu-unified, none"):
        find_gpu()


def test_importing_imports_no_mlx() -> None:
    code = "import sys, localds.ops.mlx_device as d; print('mlx' in sys.modules, d.VARIABLE)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "LOCALDS_GPU"], done.stderr


# ---- what is missing, and the remedy ----


def test_without_mlx(monkeypatch: pytest.MonkeyPatch, packages: Callable[..., None]) -> None:
    packages({})
    monkeypatch.setattr(mlx_device, "find_spec", lambda _: None)
    with pytest.raises(
        NoGpuError, match=r"not installed; pip install 'mlx\[cuda13\]>=0.32.4,<0.33'"
    ):
        find_gpu()
    packages({}, Driver((12, 8), ("RTX 3090",)))
    with pytest.raises(NoGpuError, match=r"pip install 'mlx\[cuda12\]>="):
        find_gpu()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NoGpuError, match="pip install 'mlx>="):
        find_gpu()


NO_GPU = [
    (CPU_ONLY, None, "pip uninstall -y mlx-cpu && pip install 'mlx[cuda13]>=0.32.4,<0.33'"),
    (CPU_ONLY, (12, 4), "pip uninstall -y mlx-cpu && pip install 'mlx[cuda12]>=0.32.4,<0.33'"),
    (
        BOTH,
        (13, 1),
        "mlx-cpu 0.32.4 and mlx-cuda-13 0.32.4 are installed over each other and share files; keep "
        "one: pip uninstall -y mlx-cpu && "
        "pip install --force-reinstall --no-deps mlx-cuda-13==0.32.4",
    ),
    (CUDA_13, (13, 1), "mlx-cuda-13 0.32.4 finds no GPU; see whether `nvidia-smi` lists one"),
    (CUDA_13, (12, 4), "too new for NVIDIA's driver, which is made for CUDA 12.4; update the"),
    ({"mlx": "0.32.4"}, None, "the MLX that is installed finds no GPU"),
]


@pytest.mark.parametrize(("versions", "cuda", "message"), NO_GPU)
def test_mlx_that_finds_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
    packages: Callable[..., None],
    versions: dict[str, str],
    cuda: tuple[int, int] | None,
    message: str,
) -> None:
    monkeypatch.setattr(mx, "is_available", lambda _: False)
    packages(versions, Driver(cuda, ("a card",)) if cuda else None)
    with pytest.raises(NoGpuError) as caught:
        find_gpu()
    assert message in str(caught.value)


def _no_library(name: str) -> str:
    return f"{name}: cannot open shared object file: No such file or directory"


BROKEN = [
    (CUDA_13, _no_library("libcuda.so.1"), "needs NVIDIA's driver; install that"),
    (CUDA_13, _no_library("libmlx.so"), "--force-reinstall --no-deps mlx-cuda-13==0.32.4"),
    (CPU_ONLY, _no_library("libmlx.so"), "--force-reinstall --no-deps mlx-cpu==0.32.4"),
    (BOTH, _no_library("libnccl.so.2"), "keep one: pip uninstall -y mlx-cuda-13 && pip install"),
    ({"mlx": "0.32.4"}, _no_library("libmlx.so"), "missing; pip install 'mlx[cuda13]"),
    ({"mlx-cpu": "0.32.4"}, "No module named 'mlx.core'", "missing; pip install 'mlx[cuda13]"),
    (CUDA_13, _no_library("libnccl.so.2"), "--force-reinstall mlx==0.32.4 mlx-cuda-13==0.32.4"),
]


@pytest.mark.parametrize(("versions", "text", "remedy"), BROKEN)
@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_mlx_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch,
    packages: Callable[..., None],
    versions: dict[str, str],
    text: str,
    remedy: str,
    kind: type[Exception],
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "mlx.core":
                raise kind(text)

    packages(versions)
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(NoGpuError) as caught:
        check_mlx()
    assert f"MLX is installed but cannot be loaded ({text})" in str(caught.value)
    assert remedy in str(caught.value)


def test_one_build_is_no_clash(packages: Callable[..., None]) -> None:
    for versions in ({}, CPU_ONLY, CUDA_13, {"mlx": "0.32.4", "mlx-metal": "0.32.4"}):
        packages(versions)
        assert clash() is None


@pytest.mark.parametrize(
    ("driver", "kept"),
    [(None, "mlx-cpu"), ((12, 2), "mlx-cuda-12"), ((13, 0), "mlx-cuda-13")],
)
def test_of_three_builds_the_right_one_is_kept(
    packages: Callable[..., None], driver: tuple[int, int] | None, kept: str
) -> None:
    packages(BOTH | {"mlx-cuda-12": "0.32.3"}, Driver(driver, ("x",)) if driver else None)
    removed = {"mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"} - {kept}
    problem = str(clash())
    uninstall, install = problem.split("pip uninstall -y ")[1].split(" && ")
    assert set(uninstall.split()) == removed
    version = "0.32.3" if kept == "mlx-cuda-12" else "0.32.4"
    assert install == f"pip install --force-reinstall --no-deps {kept}=={version}"


# ---- NVIDIA's driver ----


class FakeCuda:
    """libcuda, with its functions' results and what they write."""

    def __init__(self, version: int, names: list[bytes], error: int = 0) -> None:
        self.version, self.names, self.error = version, names, error

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.version
        return 0

    def cuInit(self, _: int) -> int:  # noqa: N802
        return self.error

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = len(self.names)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        assert size == len(out)
        out.value = self.names[device.value]
        return 0


@pytest.mark.parametrize(
    ("library", "driver"),
    [
        (FakeCuda(13010, [b"RTX 5090", b"RTX 3060"]), Driver((13, 1), ("RTX 5090", "RTX 3060"))),
        (FakeCuda(12080, [b"RTX 5090"], error=803), Driver((12, 8), ())),
        (None, None),
    ],
)
def test_the_driver_is_asked(
    monkeypatch: pytest.MonkeyPatch, library: FakeCuda | None, driver: Driver | None
) -> None:
    def load(name: str) -> FakeCuda:
        assert name == "libcuda.so.1"
        if library is None:
            raise OSError(_no_library(name))
        return library

    monkeypatch.setattr(nvidia.ctypes, "CDLL", load)
    assert nvidia_driver() == driver


# ---- what pip installs ----


def test_extras_bring_one_build_each() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    mac = {"sys_platform": "darwin", "platform_machine": "arm64"}
    intel_mac = mac | {"platform_machine": "x86_64"}

    def mlx(lines: list[str], machine: dict[str, str]) -> list[Requirement]:
        wanted = [Requirement(line) for line in lines]
        return [
            r for r in wanted if r.name == "mlx" and (not r.marker or r.marker.evaluate(machine))
        ]

    assert len(mlx(project["dependencies"], mac)) == 1
    assert not mlx(project["dependencies"], linux)
    assert not mlx(project["dependencies"], intel_mac)
    found = mlx(project["dependencies"], mac)
    for extra, build in (("cuda", "cuda13"), ("cuda12", "cuda12"), ("finetune", "cpu")):
        lines = project["optional-dependencies"][extra]
        assert [r.extras for r in mlx(lines, linux)] == [{build}]
        assert not mlx(lines, mac)
        found += mlx(lines, linux)
    # One range of versions everywhere, and the lint environment has its lowest.
    assert {str(r.specifier) for r in found} == {
        str(Requirement(f"mlx{mlx_install.BOUNDS}").specifier)
    }
    for requirement in mlx(project["optional-dependencies"]["lint"], linux):
        assert all(r.specifier.contains(str(requirement.specifier)[2:]) for r in found)

"""What NVIDIA's driver says, which is there before MLX is."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_LIBRARY = "libcuda.so.1"
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: the CUDA version that it is made for, and the cards that it lists."""

    cuda: tuple[int, int]
    devices: tuple[str, ...]


def nvidia_driver() -> Driver | None:
    """The driver of this machine; None where there is none, or it is no use.

    CUDA_VISIBLE_DEVICES hides cards from it, as from every CUDA program.
    """
    opened = _open()
    if opened is None:
        return None
    library, cuda = opened
    count, devices = ctypes.c_int(), []
    # Fails where no card is visible, and after an update of the driver until the next start.
    if not library.cuInit(0) and not library.cuDeviceGetCount(ctypes.byref(count)):
        devices = [_device_name(library, index) for index in range(count.value)]
    return Driver(cuda, tuple(devices))


def cuda_version() -> tuple[int, int] | None:
    """The CUDA version that the driver is made for, None without one. Wakes no card."""
    opened = _open()
    return None if opened is None else opened[1]


def _open() -> tuple[ctypes.CDLL, tuple[int, int]] | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return library, (version.value // 1000, version.value % 1000 // 10)


def _device_name(library: ctypes.CDLL, index: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    if library.cuDeviceGet(ctypes.byref(device), index) or library.cuDeviceGetName(
        name, _NAME_BYTES, device
    ):
        return "unknown"
    return name.value.decode(errors="replace")

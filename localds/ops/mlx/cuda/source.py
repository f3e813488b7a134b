"""The CUDA kernels, compiled by NVRTC when they are first asked for and launched through MLX.

MLX could compile them itself, but takes over a second for each, in every process: it puts large
headers before them. These need none and take a tenth of that, all of a model's at the same time.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache, partial
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.sections import sections

if TYPE_CHECKING:
    from collections.abc import Sequence

    Constant = int | bool | str

WARP = 32
"""Threads that compute in step."""

NVRTC = ("libnvrtc.so.13", "libnvrtc.so.12")
"""The compiler's names; MLX has loaded the one that belongs to its CUDA version."""

_sections = partial(sections, "localds.ops.mlx.cuda")


def launch(
    name: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    *,
    scalars: Sequence[int | float],
    blocks: tuple[int, int],
    threads: int,
    kind: GGMLType | None = None,
    **constants: Constant,
) -> list[mx.array]:
    """Run the kernel `name`, for blocks or rows of type `kind` if it has any, over `blocks`.

    `outputs` are shapes and types. `constants` are put before the source; a string is a type.
    """
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=compiled(name, kind, tuple(constants.items())),
        inputs=inputs,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        scalars=[_bits(value) if isinstance(value, float) else value for value in scalars],
        grid=(blocks[0] * threads, blocks[1], 1),
        threadgroup=(threads, 1, 1),
        ensure_row_contiguous=True,
    )


def _bits(value: float) -> int:
    """A float32 as the integer of the same bits: MLX 0.32 passes on integers alone."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)


@cache
def compiled(
    name: str, kind: GGMLType | None, constants: tuple[tuple[str, Constant], ...]
) -> bytes:
    """The kernel's machine code for this GPU. Raises `RuntimeError` for what does not compile."""
    info = mx.device_info()
    architecture = f"{info['compute_capability_major']}{info['compute_capability_minor']}"
    return compile_source(source(name, kind, constants), f"sm_{architecture}")


def source(name: str, kind: GGMLType | None, constants: Sequence[tuple[str, Constant]]) -> str:
    """The whole source of a kernel."""
    kernels, attention = _sections("kernels.cuh"), _sections("attention.cuh")
    parts = [kernels["device"], kernels["numbers"], *map(_definition, constants)]
    if name in attention:
        parts += [] if kind is None else [attention[kind.name]]
        return "\n".join([*parts, attention[name]])
    if kind is not None:
        blocks = _sections("blocks.cuh")
        parts += [blocks["all"], blocks[kind.name], kernels["dot"]]
    return "\n".join([*parts, kernels[name]])


def _definition(constant: tuple[str, Constant]) -> str:
    name, value = constant
    if isinstance(value, str):
        return f"using {name} = {value};"
    return f"constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {int(value)};"


@cache
def _nvrtc() -> ctypes.CDLL:
    for name in NVRTC:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(NVRTC)} can be loaded; install MLX's CUDA package again")


def compile_source(text: str, architecture: str) -> bytes:
    """Machine code of a source for an `architecture` such as sm_90; raises `RuntimeError`."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"localds.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    passed = (ctypes.c_char_p * len(options))(*options)
    status = nvrtc.nvrtcCompileProgram(program, len(options), passed)
    try:
        if status:
            log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(f"NVRTC status {status}: {log.decode(errors='replace')}")
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(
    get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p
) -> bytes:
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw

"""The CUDA backend on the CPU: `launch` as on a GPU, down to what MLX and the compiler take."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

from localds.ops.mlx.cuda import proof, source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lockstep import Lockstep
    from numpy.typing import NDArray

SHIM = f'#include "{Path(__file__).parent / "cuda_shim.h"}"\n'
ASSEMBLY = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));': "f = half_to_float(h);",
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));': "h = float_to_half(f);",
}
POINTERS = {"float*": mx.float32, "uint32_t*": mx.uint32, "int32_t*": mx.int32}
PROOFS = (proof.matrix_failure, proof.attention_failure, proof.routing_failure)


@contextmanager
def emulated_cuda(lockstep: Lockstep) -> Iterator[list[str]]:
    """Kernels of the CUDA backend run in `lockstep`, and prove themselves anew.

    Gives the names of those that ran.
    """
    launched: list[str] = []

    def compiled(name: str, *rest: Any) -> bytes:
        return source.source(name, *rest).encode()

    def launch(
        *,
        name: str,
        compiled_source: bytes,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        scalars: Sequence[int],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        ensure_row_contiguous: bool,
    ) -> list[mx.array]:
        assert ensure_row_contiguous
        launched.append(name)
        text = compiled_source.decode()
        dtypes = [*(array.dtype for array in inputs), *output_dtypes]
        arrays = [_read_only(array) for array in inputs]
        outputs = [_poisoned(*of) for of in zip(output_shapes, output_dtypes, strict=True)]
        lockstep.run(
            SHIM + _translated(text),
            _call(name, text, dtypes, scalars),
            arrays + outputs,
            scalars,
            blocks=tuple(n // size for n, size in zip(grid, threadgroup, strict=True)),
            threads=threadgroup,
        )
        return [mx.array(output) for output in outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "compiled", compiled)
        patch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
        forget_proofs()
        yield launched
    forget_proofs()


def forget_proofs() -> None:
    """Let the kernels prove themselves again."""
    for proved in PROOFS:
        proved.cache_clear()


def _read_only(array: mx.array) -> NDArray[np.generic]:
    copy: NDArray[np.generic] = np.ascontiguousarray(np.array(array))
    copy.flags.writeable = False
    return copy


def _poisoned(shape: tuple[int, ...], dtype: mx.Dtype) -> NDArray[np.generic]:
    """NaN, or large numbers: every value must be written."""
    like = np.array(mx.zeros((), dtype)).dtype
    return np.full(shape, np.nan if like.kind == "f" else 0xAB, like)


def _translated(text: str) -> str:
    """Without the kernels' two instructions."""
    for instruction, call in ASSEMBLY.items():
        assert instruction in text
        text = text.replace(instruction, call)
    return text


def _call(name: str, text: str, dtypes: Sequence[mx.Dtype], scalars: Sequence[int]) -> str:
    """The kernel's call; its parameters must be what MLX passes."""
    found = re.search(rf'extern "C" __global__ void {name}\(([^)]*)\)', text)
    assert found
    types = [" ".join(parameter.split()[:-1]) for parameter in found[1].split(",")]
    assert len(types) == len(dtypes) + len(scalars)
    half = "using T = half_t;" in text
    pointers = POINTERS | {"T*": mx.float16 if half else mx.float32}
    for parameter, dtype in zip(types, dtypes, strict=False):
        bare = parameter.removeprefix("const ")
        assert bare == "uint8_t*" or pointers[bare] == dtype, f"{name}: {parameter} for {dtype}"
    # MLX 0.32 passes on integers alone.
    assert all(type(value) is int for value in scalars)
    assert types[len(dtypes) :] == ["int"] * len(scalars)
    arguments = [f"lockstep::buffer<{t[:-1]}>({i})" for i, t in enumerate(types[: len(dtypes)])]
    arguments += [f"lockstep::scalar<int>({i})" for i in range(len(scalars))]
    return f"{name}({', '.join(arguments)});"

"""The Metal kernels: parts of the sources in this folder, which MLX compiles at the first use."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from localds.gguf import GGMLType
from localds.ops.mlx.sections import sections

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Constant = int | bool | mx.Dtype

BLOCKS = (GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q6_K, GGMLType.IQ4_NL, GGMLType.IQ4_XS)
"""The block types that the kernels read: those that MLX has no form for."""
ROWS = (GGMLType.F32, GGMLType.F16, GGMLType.Q8_0)
"""The types of cached rows that they read."""

SIMDGROUP = 32
"""Threads of a simdgroup."""

# Inputs and outputs by the names that the bodies use.
_ARGUMENTS = {
    "multiply": (("w", "x", "ids"), ("y",)),
    "convert": (("w",), ("y",)),
    "attend": (("queries", "rows", "past"), ("context", "state")),
    "merge": (("context", "state"), ("y",)),
}

_sections = partial(sections, "localds.ops.mlx.metal")


def launch(
    name: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    *,
    groups: tuple[int, int],
    threads: int,
    kind: GGMLType | None = None,
    **constants: Constant,
) -> list[mx.array]:
    """Run the kernel `name`, reading what is of type `kind`, over `groups` of threads.

    `outputs` are shapes and types; `constants` are template arguments.
    """
    return kernel(name, kind)(
        inputs=list(inputs),
        template=list(constants.items()),
        grid=(groups[0] * threads, groups[1], 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


@cache
def kernel(name: str, kind: GGMLType | None) -> Callable[..., list[mx.array]]:
    """A kernel that MLX compiles when it is first run, once for each choice of its constants."""
    inputs, outputs = _ARGUMENTS[name]
    header, body = source(name, kind)
    made = mx.fast.metal_kernel(
        name=f"localds_{name}" if kind is None else f"localds_{name}_{kind.name}",
        input_names=inputs,
        output_names=outputs,
        source=body,
        header=header,
    )
    return cast("Callable[..., list[mx.array]]", made)


def source(name: str, kind: GGMLType | None) -> tuple[str, str]:
    """What comes before a kernel's function, and the body of the function."""
    if name in ("attend", "merge"):
        attention = _sections("attention.metal")
        return "" if kind is None else attention[kind.name], attention[name]
    matrix, blocks = _sections("matrix.metal"), _sections("blocks.metal")
    header = [blocks["all"], blocks[kind.name if kind else ""]]
    if name == "multiply":
        header.append(matrix["products"])
    return "".join(header), matrix[name]

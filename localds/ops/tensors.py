"""What every device asks of a tensor before it takes it: type, shape, plain floats.

All functions raise `ValueError`, naming the tensor, for what does not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localds.gguf import GGMLType

if TYPE_CHECKING:
    from localds.gguf import Tensor

Floats = NDArray[np.float32]

COMPUTED = (
    GGMLType.F32,
    GGMLType.F16,
    GGMLType.BF16,
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.Q8_0,
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.Q4_K,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
    GGMLType.IQ4_NL,
    GGMLType.IQ4_XS,
    GGMLType.MXFP4,
)
"""The types of weights that are computed with."""


def row_stride(tensor: Tensor) -> int:
    """Bytes from one row of a tensor to the next."""
    return tensor.shape[0] // tensor.type.block_elements * tensor.type.block_bytes


def read_vector(tensor: Tensor, length: int) -> Floats:
    """A copy of a vector of plain floats, float32 [length]."""
    check_shape(tensor, (length,))
    match tensor.type:
        case GGMLType.F32:
            values = tensor.data.view(np.float32).copy()
        case GGMLType.F16:
            values = tensor.data.view(np.float16).astype(np.float32)
        case GGMLType.BF16:
            values = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            raise ValueError(
                f"tensor {tensor.name!r} has type {tensor.type.name}, expected a vector of F32, "
                "F16 or BF16"
            )
    return values


def check_tensor(tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Check that a tensor is of a type that is computed with, and of the shape `expected`."""
    if tensor.type not in COMPUTED:
        raise ValueError(
            f"tensor {tensor.name!r} has type {tensor.type.name}, which localds cannot compute; "
            f"requantize the model to one of {', '.join(kind.name for kind in COMPUTED)}"
        )
    check_shape(tensor, expected)


def check_shape(tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Check that a tensor has the shape `expected`."""
    # Writers may drop a last dimension of 1: a single expert, a single head.
    if _squeezed(tensor.shape) != _squeezed(expected):
        raise ValueError(
            f"tensor {tensor.name!r} has shape {_text(tensor.shape)}, expected {_text(expected)}"
        )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def check_frequencies(values: Floats, width: int) -> Floats:
    """The frequencies of a rope, which must rotate `width` values."""
    if 2 * len(values) != width:
        raise ValueError(f"rope: {len(values)} frequencies do not rotate {width} values")
    return np.ascontiguousarray(values, np.float32)


def vector_width(tensor: Tensor) -> int:
    """The length of a vector."""
    return dimension(tensor, 0)


def dimension(tensor: Tensor, axis: int) -> int:
    """The length of a tensor along `axis`, the fastest being 0."""
    if axis >= len(tensor.shape):
        raise ValueError(
            f"tensor {tensor.name!r} has shape {_text(tensor.shape)}, "
            f"expected at least {axis + 1} dimensions"
        )
    return tensor.shape[axis]


def present(tensor: Tensor | None, name: str, needed_by: str) -> Tensor:
    """The tensor, which a layer with `needed_by` can't do without."""
    if tensor is None:
        raise ValueError(f"weights: {needed_by} needs {name}")
    return tensor


def _text(shape: tuple[int, ...]) -> str:
    return "{" + ", ".join(map(str, shape)) + "}"

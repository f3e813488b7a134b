"""Weight matrices by MLX's own operations, which run on every device.

Types that MLX has a form for are repacked into it at load; the others stay as blocks and are taken
apart whenever they are multiplied with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import mlx.core as mx
import numpy as np

from localds.gguf import GGMLType
from localds.ops.mlx.blocks import dequantize
from localds.ops.mlx.repack import Packed, has_form, packed_group_bytes, repack, replaced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

PLAIN = {GGMLType.F32: mx.float32, GGMLType.F16: mx.float16, GGMLType.BF16: mx.bfloat16}
REPACKED_AT_ONCE = 1 << 24  # values; taken apart, each takes up to 8 bytes


class Matrix(Protocol):
    """A matrix [rows, columns], or a stack of them [n, rows, columns], on the device."""

    def __call__(self, x: mx.array) -> mx.array:
        """X @ transpose: float32 [..., n, columns] to [..., n, rows]; a stack goes with x's."""
        ...

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:
        """Residual + x @ transpose, for one matrix."""
        ...

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:
        """Each row of x [m, columns] times the matrix of a stack in ids [m]: [m, rows].

        Rows of the same matrix lie together where there are many.
        """
        ...

    def lookup(self, ids: mx.array) -> mx.array:
        """Rows `ids` as float32 [m, columns]."""
        ...

    def put(self, index: int, one: Self) -> Self:
        """A stack with `one` as its matrix `index`.

        The memory of this one serves for it if nobody keeps this one until it is computed.
        """
        ...

    def arrays(self) -> list[mx.array]:
        """What it is kept in, for `mx.eval`."""
        ...


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """Floats, as they are in the file."""

    weight: mx.array

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        return x @ self.weight.astype(mx.float32).swapaxes(-1, -2)

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:  # noqa: D102
        return residual + self(x)

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:  # noqa: D102
        weight = self.weight.astype(mx.float32).swapaxes(-1, -2)
        return mx.gather_mm(x[:, None], weight, rhs_indices=ids)[:, 0]

    def lookup(self, ids: mx.array) -> mx.array:  # noqa: D102
        return self.weight[ids].astype(mx.float32)

    def put(self, index: int, one: PlainMatrix) -> PlainMatrix:  # noqa: D102
        return PlainMatrix(replaced(self.weight, index, one.weight))

    def arrays(self) -> list[mx.array]:  # noqa: D102
        return [self.weight]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Groups of 32 in MLX's form."""

    packed: Packed

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        p = self.packed
        return mx.quantized_matmul(
            x, *p.arrays(), transpose=True, group_size=32, bits=p.bits, mode=p.mode
        )

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:  # noqa: D102
        return residual + self(x)

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:  # noqa: D102
        p = self.packed
        product = mx.gather_qmm(
            x[:, None],
            *p.arrays(),
            rhs_indices=ids,
            transpose=True,
            group_size=32,
            bits=p.bits,
            mode=p.mode,
        )
        return product[:, 0]

    def lookup(self, ids: mx.array) -> mx.array:  # noqa: D102
        p = self.packed.map(lambda array: array[ids])
        # Affine values have the type of their scales, the others the one that is asked for.
        kind = None if p.biases is not None else mx.float32
        return mx.dequantize(*p.arrays(), group_size=32, bits=p.bits, mode=p.mode, dtype=kind)

    def put(self, index: int, one: PackedMatrix) -> PackedMatrix:  # noqa: D102
        return PackedMatrix(self.packed.put(index, one.packed))

    def arrays(self) -> list[mx.array]:  # noqa: D102
        return [array for array in self.packed.arrays() if array is not None]


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """Blocks of the file, uint8 [..., rows, bytes]."""

    kind: GGMLType
    blocks: mx.array

    def __call__(self, x: mx.array) -> mx.array:  # noqa: D102
        return x @ dequantize(self.kind, self.blocks).swapaxes(-1, -2)

    def plus(self, residual: mx.array, x: mx.array) -> mx.array:  # noqa: D102
        return residual + self(x)

    def chosen(self, x: mx.array, ids: mx.array) -> mx.array:  # noqa: D102
        if len(ids) < len(self.blocks):
            weight = dequantize(self.kind, self.blocks[ids])
            return (weight @ x[:, :, None])[..., 0]
        weight = dequantize(self.kind, self.blocks).swapaxes(-1, -2)
        return mx.gather_mm(x[:, None], weight, rhs_indices=ids)[:, 0]

    def lookup(self, ids: mx.array) -> mx.array:  # noqa: D102
        return dequantize(self.kind, self.blocks[ids])

    def put(self, index: int, one: BlockMatrix) -> BlockMatrix:  # noqa: D102
        return BlockMatrix(self.kind, replaced(self.blocks, index, one.blocks))

    def arrays(self) -> list[mx.array]:  # noqa: D102
        return [self.blocks]


def portable_matrix(kind: GGMLType, rows: Bytes) -> Matrix:
    """Bring `rows` uint8 [..., rows, bytes] to the device, in MLX's form where it has one."""
    if kind in PLAIN:
        return PlainMatrix(plain_array(kind, rows))
    if has_form(kind):
        return PackedMatrix(_repack_parts(kind, rows))
    blocks = mx.array(rows)
    mx.eval(blocks)
    return BlockMatrix(kind, blocks)


def plain_array(kind: GGMLType, rows: Bytes) -> mx.array:
    """Floats of the file, from uint8 [..., bytes]."""
    if kind is GGMLType.BF16:
        array = mx.array(np.ascontiguousarray(rows).view(np.uint16)).view(mx.bfloat16)
    else:
        array = mx.array(
            np.ascontiguousarray(rows).view(np.float32 if kind is GGMLType.F32 else np.float16)
        )
    mx.eval(array)
    return array


def portable_bytes(kind: GGMLType, nbytes: int) -> int:
    """Bytes on the device of `nbytes` from the file, see `portable_matrix`."""
    if not has_form(kind):
        return nbytes
    return nbytes // kind.block_bytes * kind.block_elements // 32 * packed_group_bytes(kind)


def _repack_parts(kind: GGMLType, rows: Bytes) -> Packed:
    """Repack some rows at a time, into their place: what is taken apart is larger than the rows."""
    flat = rows.reshape(-1, rows.shape[-1])
    columns = rows.shape[-1] // kind.block_bytes * kind.block_elements
    step = max(REPACKED_AT_ONCE // columns, 1)
    first = repack(kind, mx.array(flat[:1]))
    whole = first.map(lambda array: mx.zeros((len(flat), array.shape[1]), array.dtype))
    for start in range(0, len(flat), step):
        whole = whole.put(start, repack(kind, mx.array(flat[start : start + step])))
        mx.eval(*(array for array in whole.arrays() if array is not None))
    return whole.map(lambda array: array.reshape(*rows.shape[:-1], -1))

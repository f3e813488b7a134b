"""Products with matrices that are written out slice by slice, against NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from layer_cases import rng

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.memory.gpu_sizes import WRITTEN_BYTES  # noqa: E402
from localds.ops.mlx import written  # noqa: E402
from localds.ops.mlx.written import chosen_product, product  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

ROW = 64  # values, of 4 bytes once they are written


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of at most ten rows."""
    monkeypatch.setattr(written, "SLICE_BYTES", 10 * 4 * ROW + 7)


class Writer:
    """Writes blocks that are float16; `sizes` are the matrices or rows of what it wrote."""

    def __init__(self, axis: int, dtype: Any = mx.float32) -> None:
        self.axis = axis
        self.dtype = dtype
        self.sizes: list[int] = []

    def __call__(self, blocks: Any) -> Any:
        self.sizes.append(blocks.shape[self.axis])
        return mx.contiguous(blocks).view(mx.float16).astype(self.dtype)


def halves(*shape: int) -> tuple[Any, NDArray[np.float64]]:
    """Blocks uint8, and their values."""
    values = rng(1).standard_normal(shape).astype(np.float16)
    return mx.array(values.view(np.uint8)), values.astype(np.float64)


def near(actual: Any, expected: NDArray[np.float64], bound: float = 2e-6) -> None:
    actual = np.array(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(("rows", "sizes"), [(10, [10]), (11, [10, 1]), (35, [10, 10, 10, 5])])
def test_a_matrix_is_written_by_rows(rows: int, sizes: list[int]) -> None:
    blocks, values = halves(rows, ROW)
    x = rng(2).standard_normal((9, ROW)).astype(np.float32)
    write = Writer(axis=0)
    near(product(mx.array(x), blocks, write, itemsize=4), x @ values.T)
    assert write.sizes == sizes


@pytest.mark.usefixtures("small_slices")
def test_matrices_of_heads_are_written_by_the_rows_of_all() -> None:
    blocks, values = halves(3, 8, ROW)
    x = rng(2).standard_normal((3, 9, ROW)).astype(np.float32)
    write = Writer(axis=1)
    near(product(mx.array(x), blocks, write, itemsize=4), x @ values.transpose(0, 2, 1))
    assert write.sizes == [3, 3, 2]


@pytest.mark.usefixtures("small_slices")
def test_rows_of_any_size_are_multiplied_in_float16() -> None:
    """Values that float16 has no numbers for, and zeros."""
    blocks, values = halves(25, ROW)
    x = rng(2).standard_normal((9, ROW)).astype(np.float32)
    x *= 10.0 ** np.arange(-9, 9, 2, dtype=np.float32)[:, None]
    x[4] = 0
    found = np.array(product(mx.array(x), blocks, Writer(0, mx.float16), itemsize=4))
    for row, expected in zip(found, x @ values.T, strict=True):
        near(row, expected, 5e-3)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    ("ids", "sizes"),
    [
        (np.repeat(np.arange(7), 10), [2, 2, 2, 1]),
        (np.sort(rng(5).integers(0, 7, 70)), [2, 2, 2, 1]),
        (np.repeat([1, 2, 5], [1, 60, 9]), [2, 2, 2]),
        (np.repeat([6], 64), [1]),
    ],
    ids=["all", "random", "not all", "the last"],
)
def test_a_stack_is_written_by_matrices(ids: NDArray[np.int64], sizes: list[int]) -> None:
    """Slices of which no row has need are left out."""
    blocks, values = halves(7, 5, ROW)
    x = rng(6).standard_normal((len(ids), ROW)).astype(np.float32)
    write = Writer(axis=0)
    found = chosen_product(mx.array(x), blocks, mx.array(ids.astype(np.uint32)), write, itemsize=4)
    near(found, np.einsum("nc,nrc->nr", x, values[ids]))
    assert write.sizes == sizes


@pytest.mark.usefixtures("small_slices")
def test_what_is_not_copied_is_taken_as_a_whole() -> None:
    values = rng(1).standard_normal((7, 5, ROW)).astype(np.float32)
    blocks, x = mx.array(values), rng(6).standard_normal((70, ROW)).astype(np.float32)
    ids = np.repeat(np.arange(7), 10)
    whole: list[tuple[int, ...]] = []

    def view(blocks: Any) -> Any:
        whole.append(blocks.shape)
        return blocks

    found = chosen_product(mx.array(x), blocks, mx.array(ids.astype(np.uint32)), view, itemsize=0)
    near(found, np.einsum("nc,nrc->nr", x.astype(np.float64), values[ids]))
    near(product(mx.array(x), blocks[0], view, itemsize=0), x.astype(np.float64) @ values[0].T)
    assert whole == [(7, 5, ROW), (5, ROW)]


@pytest.mark.parametrize("chosen", [False, True], ids=["a matrix", "a stack"])
def test_no_more_than_two_slices_lie_in_memory(
    chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the planner counts; of eight, which would take four times as much."""
    assert 2 * written.SLICE_BYTES == WRITTEN_BYTES
    limit = 1 << 20
    monkeypatch.setattr(written, "SLICE_BYTES", limit)
    blocks, _ = halves(32, 256, 256)  # of 2^18 bytes each, once they are written
    x = mx.array(rng(2).standard_normal((9, 256)).astype(np.float32))
    ids = mx.array(np.array([0, 4, 7, 11, 15, 16, 20, 27, 31], np.uint32))

    def write(blocks: Any) -> Any:
        return blocks.view(mx.float16).astype(mx.float32)

    mx.eval(x, blocks, ids)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    if chosen:
        y = chosen_product(x, blocks, ids, write, itemsize=4)
    else:
        y = product(x, blocks.reshape(-1, blocks.shape[-1]), write, itemsize=4)
    mx.eval(y)
    others = 3 * y.nbytes + 2 * x.nbytes
    assert limit <= mx.get_peak_memory() - before <= 2 * limit + others

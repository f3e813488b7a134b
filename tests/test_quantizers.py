"""The quantizers: exact where a type leaves no choice, and least error where it does.

Oracles are the gguf package's numpy code and llama.cpp's library (marked `interop`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from llama_cpp import find_library

from localds import _native
from localds.gguf import GGMLType
from localds.ops.tensors import COMPUTED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

EXACT = ("F32", "F16", "BF16", "Q8_0")
SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")
SUPER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
CHOOSING = SMALL + SUPER
ROWS, COLUMNS = 24, 1536
# Relative error of a normal distribution, from rate-distortion theory's 6.02 dB a bit and the
# observation that scalar quantizers lose up to 4 dB; a wrong bit anywhere costs far more.
LARGEST_ERROR = {
    "Q2_K": 0.30, "Q3_K": 0.16, "IQ4_XS": 0.085, "IQ4_NL": 0.085, "MXFP4": 0.125, "Q4_0": 0.095,
    "Q4_1": 0.085, "Q4_K": 0.080, "Q5_0": 0.048, "Q5_1": 0.042, "Q5_K": 0.041, "Q6_K": 0.021,
}  # fmt: skip


def samples() -> Iterator[tuple[str, Floats]]:
    rng = np.random.default_rng(7)
    shape = (ROWS, COLUMNS)
    normal = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    yield "normal", normal
    yield "heavy tails", (rng.standard_t(4, shape) * 0.02).astype(np.float32)
    columns = normal.copy()
    columns[:, ::97] *= 12
    yield "large columns", columns
    yield "off centre", normal + np.float32(0.03)
    yield "mostly zero", np.where(rng.random(shape) < 0.7, np.float32(0), normal)


def importance() -> Floats:
    return np.exp(np.random.default_rng(8).standard_normal(COLUMNS) * 1.5).astype(np.float32)


def quantize(name: str, x: Floats, weights: Floats | None = None) -> NDArray[np.uint8]:
    return _native.quantize(int(GGMLType[name]), x, weights)


def dequantize(name: str, blocks: NDArray[np.uint8]) -> Floats:
    """With the gguf package."""
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


def error(name: str, x: Floats, blocks: NDArray[np.uint8], weights: Floats | None = None) -> float:
    """Weighted squared error."""
    difference = x.astype(np.float64) - dequantize(name, blocks)
    return float((np.square(difference) * (1 if weights is None else weights)).sum())


@pytest.mark.parametrize("name", EXACT)
def test_types_without_a_choice_are_exact(name: str) -> None:
    for label, x in samples():
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(
            quantize(name, x).ravel(), expected.view(np.uint8).ravel(), label
        )


def test_ties_of_q8_0_round_away_from_zero() -> None:
    x = np.array([[127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997] + [0.0] * 25], np.float32)
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(quantize("Q8_0", x), expected)


@pytest.mark.parametrize("name", CHOOSING)
def test_error_of_normal_weights(name: str) -> None:
    x = next(samples())[1]
    relative = np.sqrt(error(name, x, quantize(name, x)) / np.square(x, dtype=np.float64).sum())
    assert relative < LARGEST_ERROR[name]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_no_worse_than_the_gguf_package(name: str) -> None:
    for label, x in samples():
        theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
        assert error(name, x, quantize(name, x)) <= error(name, x, theirs), label


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "IQ4_NL", "MXFP4", "Q3_K", "IQ4_XS"])
def test_values_on_the_grid_stay(name: str) -> None:
    """What has been quantized once is found again.

    Of the other types a search finds another solution now and then: two scales make it too wide.
    """
    x = next(samples())[1]
    once = dequantize(name, quantize(name, x))
    np.testing.assert_allclose(dequantize(name, quantize(name, once)), once, atol=1e-5)


@pytest.mark.parametrize("name", CHOOSING)
def test_importance_moves_the_error(name: str) -> None:
    x = next(samples())[1]
    weights = np.ones(COLUMNS, np.float32)
    weights[::8] = 100
    plain = dequantize(name, quantize(name, x)) - x
    weighted = dequantize(name, quantize(name, x, weights)) - x
    # The scales of MXFP4 are powers of two: there is little to choose.
    share = 0.99 if name == "MXFP4" else 0.9
    assert np.square(weighted[:, ::8]).sum() < share * np.square(plain[:, ::8]).sum()
    assert error(name, x, quantize(name, x, weights), weights) < error(
        name, x, quantize(name, x), weights
    )


@pytest.mark.parametrize("name", CHOOSING)
def test_importance_of_nothing_counts_as_none(name: str) -> None:
    x = next(samples())[1]
    zeros = np.zeros(COLUMNS, np.float32)
    np.testing.assert_array_equal(quantize(name, x, zeros), quantize(name, x))


@pytest.mark.parametrize("name", CHOOSING)
def test_extreme_values(name: str) -> None:
    """Zeros, the smallest and the largest numbers, one large among small ones: all stay finite."""
    x = np.zeros((6, 512), np.float32)
    x[1] = 1e-40
    x[2] = np.linspace(-1e-7, 1e-7, 512)
    x[3, 5] = 60000
    x[4] = np.linspace(-3e38, 3e38, 512)
    x[5] = 0.25
    result = dequantize(name, quantize(name, x))
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result[:1], 0)
    np.testing.assert_allclose(result[1], 0, atol=1e-38 if name == "MXFP4" else 0)
    assert result[3, 5] == pytest.approx(60000, rel=0.2 if name == "MXFP4" else 0.07)
    np.testing.assert_allclose(result[5], 0.25, rtol=0.01)


@pytest.mark.parametrize("name", [*EXACT, *CHOOSING])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(name: str, value: float) -> None:
    x = np.ones((300, 512), np.float32)
    x[211, 499] = value
    with pytest.raises(ValueError, match="row 211, column 499 is NaN, infinite"):
        quantize(name, x)


def test_refuses_what_f16_cannot_hold() -> None:
    x = np.full((1, 32), 65519, np.float32)
    assert np.isfinite(dequantize("F16", quantize("F16", x))).all()
    x[0, 3] = -65520
    with pytest.raises(ValueError, match=r"row 0, column 3 is .*too large for F16"):
        quantize("F16", x)


def test_refuses_wrong_sizes() -> None:
    x = np.ones((2, 48), np.float32)
    with pytest.raises(ValueError, match="48 columns are not a multiple of the 32"):
        quantize("Q4_0", x)
    with pytest.raises(ValueError, match="one value for each of 48 columns"):
        quantize("F16", x, np.ones(47, np.float32))


@pytest.mark.parametrize("name", [kind.name for kind in COMPUTED])
def test_same_bits_on_any_threads_and_instruction_set(name: str) -> None:
    x = np.concatenate([x for _, x in samples()])
    isa, threads = _native.isa(), _native.threads()
    results = []
    try:
        for set_isa in _native.available_isas():
            _native.select_isa(set_isa)
            for count in (1, 3):
                _native.set_threads(count)
                results.append(quantize(name, x, importance()))
    finally:
        _native.select_isa(isa)
        _native.set_threads(threads)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("columns", [32, 96, 544])
def test_rows_do_not_depend_on_their_neighbours(name: str, columns: int) -> None:
    x = next(samples())[1].reshape(-1)[: 7 * columns].reshape(7, columns)
    weights = importance()[:columns]
    whole = quantize(name, x, weights)
    for row in range(7):
        np.testing.assert_array_equal(quantize(name, x[row : row + 1], weights)[0], whole[row])


Quantize = Callable[["Floats", "Floats | None"], "NDArray[np.uint8]"]


@pytest.fixture(scope="module")
def llama_cpp_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(find_library("libggml-base.so")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


@pytest.mark.interop
@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_worse_than_llama_cpp(llama_cpp_library: ctypes.CDLL, name: str, weighted: bool) -> None:
    weights = importance() if weighted else None
    for label, x in samples():
        ours = quantize(name, x, weights)
        theirs = np.empty_like(ours)
        llama_cpp_library.ggml_quantize_chunk(
            int(GGMLType[name]), x.ctypes.data, theirs.ctypes.data, 0, ROWS, COLUMNS,
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        ratio = error(name, x, ours, weights) / error(name, x, theirs, weights)
        print(f"{name} {'weighted' if weighted else 'plain'}, {label}: {ratio:.3f} of their error")
        assert ratio <= 1.01

"""The kernels of every instruction set, against gguf's numpy dequantizers and numpy products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GType
from gguf import quants

from localds import _native as native

INT8_TYPES = [
    GType.Q4_0,
    GType.Q4_1,
    GType.Q5_0,
    GType.Q5_1,
    GType.Q8_0,
    GType.IQ4_NL,
    GType.MXFP4,
    GType.Q2_K,
    GType.Q3_K,
    GType.Q4_K,
    GType.Q5_K,
    GType.Q6_K,
    GType.IQ4_XS,
]
FLOAT_TYPES = [GType.F32, GType.F16, GType.BF16]
# Where a block has its float16 fields.
HALF_OFFSETS = {
    GType.Q4_0: [0],
    GType.Q4_1: [0, 2],
    GType.Q5_0: [0],
    GType.Q5_1: [0, 2],
    GType.Q8_0: [0],
    GType.IQ4_NL: [0],
    GType.MXFP4: [],
    GType.Q2_K: [80, 82],
    GType.Q3_K: [108],
    GType.Q4_K: [0, 2],
    GType.Q5_K: [0, 2],
    GType.Q6_K: [208],
    GType.IQ4_XS: [0],
}
TOKENS = {"gemv": [1, 2, 3, 4, 5, 8, 16], "gemm": [1, 2, 3, 5, 8, 11, 12, 13, 16, 33, 300]}
# Sums in float32: some rounding steps for every term.
TIGHT = 2e-6


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


def random_blocks(rng: np.random.Generator, kind: GType, rows: int, cols: int) -> np.ndarray:
    """Rows of random bytes whose scales are ordinary numbers: every bit pattern is a weight."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, cols // elements, size), dtype=np.uint8)
    for offset in HALF_OFFSETS[kind]:
        scale = rng.uniform(-0.1, 0.1, raw.shape[:2]).astype("<f2")
        raw[..., offset : offset + 2] = scale[..., None].view(np.uint8)
    if kind is GType.MXFP4:
        raw[..., 0] = rng.integers(118, 128, raw.shape[:2])
    return raw.reshape(rows, -1)


def make_matrix(kind: GType, rows: int, cols: int, data: np.ndarray) -> native.Matrix:
    return native.Matrix(int(kind), rows, cols, 1, data.reshape(-1).view(np.uint8))


def quantized_activations(x: np.ndarray) -> np.ndarray:
    """What the products see of x: int8 in groups of 32, scale = largest magnitude / 127."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        factor = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    values = np.rint(groups * factor) * (largest / np.float32(127)).astype(np.float64)
    return values.reshape(x.shape)


def widths(kind: GType) -> list[int]:
    return [256, 2048] if gguf.GGML_QUANT_SIZES[kind][0] == 256 else [32, 128, 256, 576, 1408]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", INT8_TYPES, ids=lambda t: t.name)
def test_dequantize(kind: GType) -> None:
    rng = np.random.default_rng(1)
    for cols in widths(kind):
        data = random_blocks(rng, kind, 5, cols)
        expected = quants.dequantize(data, kind)
        got = native.dequantize(make_matrix(kind, 5, cols, data))[0]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
@pytest.mark.parametrize("kind", INT8_TYPES, ids=lambda t: t.name)
def test_product(isa: str, kind: GType, kernel: str) -> None:
    rng = np.random.default_rng(2)
    for cols in widths(kind):
        for rows in (1, 37) if isa == "portable" else (1, 16, 37, 64):
            data = random_blocks(rng, kind, rows, cols)
            matrix = make_matrix(kind, rows, cols, data)
            weights = quants.dequantize(data, kind).astype(np.float64)
            x = rng.normal(size=(max(TOKENS[kernel]), cols)).astype(np.float32)
            seen = quantized_activations(x)
            expected, terms = seen @ weights.T, np.abs(seen) @ np.abs(weights).T
            plain = x.astype(np.float64) @ weights.T
            # Rounding to int8 moves an activation by half a step of its group at most.
            steps = np.abs(x.reshape(len(x), -1, 32)).max(axis=-1).repeat(32, axis=-1) / 254
            for n in TOKENS[kernel] if rows == 37 else (1, 13):
                got = native.matmul(matrix, x[:n], kernel=kernel)
                assert got.shape == (n, rows)
                assert np.all(np.abs(got - expected[:n]) <= TIGHT * terms[:n])
                bound = (1 + 1e-3) * steps[:n] @ np.abs(weights).T + 1e-6
                assert np.all(np.abs(got - plain[:n]) <= bound)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", FLOAT_TYPES, ids=lambda t: t.name)
def test_float_product(kind: GType) -> None:
    rng = np.random.default_rng(3)
    for cols in (1, 5, 64, 577, 2048):
        for rows in (1, 37, 64):
            weights = rng.normal(size=(rows, cols)).astype(np.float32)
            data = np.ascontiguousarray(quants.quantize(weights, kind))
            stored = quants.dequantize(data, kind).astype(np.float64)
            x = rng.normal(size=(33, cols)).astype(np.float32)
            expected, terms = x @ stored.T, np.abs(x) @ np.abs(stored).T
            for n in (1, 2, 3, 5, 33):
                got = native.matmul(make_matrix(kind, rows, cols, data), x[:n])
                assert np.all(np.abs(got - expected[:n]) <= TIGHT * terms[:n])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", FLOAT_TYPES, ids=lambda t: t.name)
def test_dequantize_float(kind: GType) -> None:
    weights = np.random.default_rng(4).normal(size=(3, 77)).astype(np.float32)
    data = np.ascontiguousarray(quants.quantize(weights, kind))
    got = native.dequantize(make_matrix(kind, 3, 77, data))[0]
    np.testing.assert_array_equal(got, quants.dequantize(data, kind))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", [*INT8_TYPES, *FLOAT_TYPES], ids=lambda t: t.name)
def test_rows_do_not_depend_on_their_neighbours(kind: GType) -> None:
    """A matrix cut into pieces at any row gives the same bits."""
    rng = np.random.default_rng(5)
    rows, cols = 53, 512
    if kind in FLOAT_TYPES:
        weights = rng.normal(size=(rows, cols)).astype(np.float32)
        data = np.ascontiguousarray(quants.quantize(weights, kind)).view(np.uint8)
    else:
        data = random_blocks(rng, kind, rows, cols)
    x = rng.normal(size=(29, cols)).astype(np.float32)
    for kernel, n in (("gemv", 3), ("gemm", 3), ("gemm", 29)):
        whole = native.matmul(make_matrix(kind, rows, cols, data), x[:n], kernel=kernel)
        for cuts in ([0, 1, 53], [0, 5, 22, 23, 40, 53]):
            pieces = [
                native.matmul(make_matrix(kind, b - a, cols, data[a:b]), x[:n], kernel=kernel)
                for a, b in itertools.pairwise(cuts)
            ]
            np.testing.assert_array_equal(np.hstack(pieces), whole)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", INT8_TYPES, ids=lambda t: t.name)
def test_tokens_do_not_depend_on_their_neighbours(kind: GType) -> None:
    rng = np.random.default_rng(6)
    matrix = make_matrix(kind, 20, 512, random_blocks(rng, kind, 20, 512))
    x = rng.normal(size=(29, 512)).astype(np.float32)
    for kernel in ("gemv", "gemm"):
        together = native.matmul(matrix, x, kernel=kernel)
        alone = [native.matmul(matrix, x[i : i + 1], kernel=kernel) for i in range(len(x))]
        np.testing.assert_array_equal(together, np.vstack(alone))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", INT8_TYPES, ids=lambda t: t.name)
def test_largest_values_do_not_overflow(kind: GType) -> None:
    """Extreme weights times extreme activations: no sum saturates."""
    cols = 256
    for fill in (0x00, 0x7F, 0x80, 0x81, 0xFF):
        data = np.full_like(random_blocks(np.random.default_rng(0), kind, 3, cols), fill)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        raw = data.reshape(3, cols // elements, size)
        for offset in HALF_OFFSETS[kind]:
            raw[..., offset : offset + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        if kind is GType.MXFP4:
            raw[..., 0] = 128
        weights = quants.dequantize(data, kind).astype(np.float64)
        for sign in (1, -1):
            x = np.full((13, cols), sign, dtype=np.float32)
            expected, terms = x @ weights.T, np.abs(x) @ np.abs(weights).T
            for kernel in ("gemv", "gemm"):
                got = native.matmul(make_matrix(kind, 3, cols, data), x, kernel=kernel)
                # Offsets are subtracted at the end, so small sums keep the error of large ones.
                assert np.all(np.abs(got - expected) <= TIGHT * (terms + 128 * cols))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", INT8_TYPES, ids=lambda t: t.name)
def test_hostile_blocks_do_not_crash(kind: GType) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, (9, 512 // elements * size), dtype=np.uint8)
    matrix = make_matrix(kind, 9, 512, data)
    x = np.full((13, 512), 1e38, dtype=np.float32)
    native.dequantize(matrix)
    for kernel in ("gemv", "gemm"):
        assert native.matmul(matrix, x, kernel=kernel).shape == (13, 9)


@pytest.mark.usefixtures("isa")
def test_nan_activations_give_nan() -> None:
    rng = np.random.default_rng(8)
    matrix = make_matrix(GType.Q4_K, 16, 256, random_blocks(rng, GType.Q4_K, 16, 256))
    for kernel in ("gemv", "gemm"):
        for bad in (np.nan, np.inf):
            x = rng.normal(size=(2, 256)).astype(np.float32)
            x[1, 77] = bad
            got = native.matmul(matrix, x, kernel=kernel)
            assert np.all(np.isfinite(got[0]))
            assert not np.any(np.isfinite(got[1]))


@pytest.mark.usefixtures("isa")
def test_zero_and_tiny_activations_give_zero() -> None:
    rng = np.random.default_rng(9)
    matrix = make_matrix(GType.Q6_K, 16, 256, random_blocks(rng, GType.Q6_K, 16, 256))
    for value in (0, 1e-40, 1e-31):
        x = np.full((2, 256), value, dtype=np.float32)
        assert np.all(native.matmul(matrix, x) == 0)


@pytest.mark.parametrize("kind", [GType.F32, GType.F16, GType.Q8_0], ids=lambda t: t.name)
def test_quantize_as_gguf_does(kind: GType) -> None:
    rng = np.random.default_rng(10)
    exponent = rng.integers(-12, 4, size=(50, 1))
    x = (rng.normal(size=(50, 576)) * 10.0**exponent).astype(np.float32)
    x[3] = 0
    expected = quants.quantize(x, kind).view(np.uint8)
    np.testing.assert_array_equal(native.quantize(int(kind), x), expected)


def test_every_half_survives() -> None:
    """All float16 patterns to float32, and the finite ones back."""
    bits = np.arange(65536, dtype=np.uint16)
    matrix = native.Matrix(int(GType.F16), 256, 256, 1, bits.view(np.uint8))
    for isa in native.available_isas():
        native.select_isa(isa)
        values = native.dequantize(matrix)[0]
        np.testing.assert_array_equal(values.reshape(-1), bits.view(np.float16).astype(np.float32))
    native.select_isa(native.available_isas()[0])
    finite = np.isfinite(values.reshape(-1))
    back = native.quantize(int(GType.F16), values.reshape(-1)[finite][None]).view(np.uint16)
    np.testing.assert_array_equal(back[0], bits[finite])


@pytest.mark.usefixtures("isa")
def test_gemm_nt() -> None:
    rng = np.random.default_rng(11)
    for m, n, k in [(1, 1, 1), (3, 5, 7), (4, 4, 64), (9, 13, 577), (2, 33, 130)]:
        a, b = (rng.normal(size=(size, k)).astype(np.float32) for size in (m, n))
        terms = np.abs(a) @ np.abs(b).T
        error = np.abs(native.gemm_nt(a, b) - a.astype(np.float64) @ b.T.astype(np.float64))
        assert np.all(error <= TIGHT * terms)


@pytest.mark.usefixtures("isa")
def test_gemm_nn() -> None:
    rng = np.random.default_rng(12)
    for m, n, k in [(1, 1, 1), (3, 5, 7), (8, 64, 64), (9, 77, 130), (17, 33, 200), (6, 512, 3)]:
        a = rng.normal(size=(m, k)).astype(np.float32)
        b = rng.normal(size=(k, n)).astype(np.float32)
        c = rng.normal(size=(m, n)).astype(np.float32)
        expected = c + a.astype(np.float64) @ b
        terms = np.abs(c) + np.abs(a) @ np.abs(b)
        assert np.all(np.abs(native.gemm_nn(a, b, c) - expected) <= 5e-6 * terms)


@pytest.mark.usefixtures("isa")
def test_rms_norm() -> None:
    rng = np.random.default_rng(13)
    for n in (1, 7, 64, 512, 2048, 7169):
        x, weight = rng.normal(size=(2, n)).astype(np.float32)
        wide = x.astype(np.float64)
        expected = wide / np.sqrt(np.mean(wide**2) + 1e-6) * weight
        np.testing.assert_allclose(native.rms_norm(x, weight, 1e-6), expected, rtol=1e-6)


@pytest.mark.usefixtures("isa")
def test_swiglu() -> None:
    gate = np.linspace(-120, 120, 4803, dtype=np.float32)
    up = np.random.default_rng(14).normal(size=gate.size).astype(np.float32)
    wide = gate.astype(np.float64)
    expected = wide / (1 + np.exp(-wide)) * up
    np.testing.assert_allclose(native.swiglu(gate, up), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.usefixtures("isa")
def test_exp_sum() -> None:
    for n in (1, 5, 16, 1000):
        x = np.linspace(-87, 3, n, dtype=np.float32)
        values, total = native.exp_sum(x, 3.0)
        expected = np.exp((x - np.float32(3)).astype(np.float64))
        # An absolute 2e-45 is one unit among subnormal numbers.
        np.testing.assert_allclose(values, expected, rtol=2.5e-7, atol=2e-45)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-6, atol=2e-45)
    values, total = native.exp_sum(np.array([-np.inf, -1e30, 0, np.nan], np.float32), 0.0)
    assert list(values[:3]) == [0, 0, 1]
    assert np.isnan(values[3])
    assert np.isnan(total)


def test_batches_may_lie_apart() -> None:
    rng = np.random.default_rng(15)
    data = random_blocks(rng, GType.Q8_0, 3 * 10, 64)
    matrix = native.Matrix(int(GType.Q8_0), 4, 64, 3, data.reshape(-1), 10 * data.shape[1])
    x = rng.normal(size=(2, 64)).astype(np.float32)
    for batch in range(3):
        part = make_matrix(GType.Q8_0, 4, 64, data[10 * batch : 10 * batch + 4])
        np.testing.assert_array_equal(native.matmul(matrix, x, batch), native.matmul(part, x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((99, 1, 32, 1, 34), "type id 99"),
        ((8, 1, 33, 1, 34), "33 columns"),
        ((8, 0, 32, 1, 0), "positive"),
        ((8, 2, 32, 1, 34), "take 68"),
        ((8, 1, 32, 2, 68, 33), "batch_bytes 33"),
        ((8, 1, 32, 2, 67, 34), "67 bytes"),
        ((8, 2**40, 2**40, 2**40, 1), "overflow"),
    ],
)
def test_matrix_rejects(arguments: tuple[int, ...], message: str) -> None:
    kind, rows, cols, batch, size, *rest = arguments
    with pytest.raises(ValueError, match=message):
        native.Matrix(kind, rows, cols, batch, np.zeros(size, np.uint8), *rest)


def test_matmul_rejects() -> None:
    matrix = native.Matrix(0, 2, 8, 1, np.zeros(64, np.uint8))
    with pytest.raises(ValueError, match="7 columns"):
        native.matmul(matrix, np.zeros((1, 7), np.float32))
    with pytest.raises(ValueError, match="batch 1"):
        native.matmul(matrix, np.zeros((1, 8), np.float32), 1)


def test_unknown_isa_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="portable"):
        native.select_isa("vax")

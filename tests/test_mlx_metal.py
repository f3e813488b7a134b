"""The Metal kernels, whose sources run on the CPU as MLX would give them to a Mac."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import gguf.quants
import lockstep
import numpy as np
import pytest
from layer_cases import EPS, hidden_states, mla_tensors, mla_weights, rng, rope

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")
if mx.metal.is_available():
    pytest.skip("there is a GPU, which tests/test_ops_mlx.py uses", allow_module_level=True)
if lockstep.COMPILER is None:
    pytest.skip(lockstep.NO_COMPILER, allow_module_level=True)

from derive_gguf import rewrite  # noqa: E402
from divergence import mean_kl  # noqa: E402
from metal_emulator import MetalEmulator  # noqa: E402
from test_golden import convert_variant, golden  # noqa: E402
from test_ops_mlx import copied_metadata, finish, random_blocks  # noqa: E402

from localds import _native  # noqa: E402
from localds.gguf import GGMLType, GGUFFile  # noqa: E402
from localds.ops import MlaShape  # noqa: E402
from localds.ops.mlx import MlxOps, build_decoder, written  # noqa: E402
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.blocks import QUANTIZED  # noqa: E402
from localds.ops.mlx.cache import DTYPES, DeviceRows, encoded  # noqa: E402
from localds.ops.mlx.matrix import BlockMatrix, PackedMatrix, PlainMatrix  # noqa: E402
from localds.ops.mlx.metal import MetalBackend, proof, source  # noqa: E402
from localds.ops.mlx.metal.attend import attend_one  # noqa: E402
from localds.ops.mlx.metal.matrix import FEW, MetalMatrix  # noqa: E402
from localds.ops.mlx.repack import has_form  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from localds.ops.mlx.backend import Backend

    Floats = NDArray[np.float32]

BLOCKS, ROWS = source.BLOCKS, source.ROWS
each_block = pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
each_row = pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> MetalEmulator:
    return MetalEmulator(lockstep.Lockstep(tmp_path_factory.mktemp("metal")))


@pytest.fixture(autouse=True)
def metal(machine: MetalEmulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetalEmulator]:
    """MLX as on a Mac; what was proved before is forgotten."""
    monkeypatch.setattr(mx.fast, "metal_kernel", machine)
    monkeypatch.setattr(mx, "gather_mm", partial(in_float32, mx.gather_mm))
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    machine.launched.clear()
    forget()
    yield machine
    forget()
    mx.set_default_device(before)


def in_float32(gather_mm: Any, x: Any, weight: Any, **options: Any) -> Any:
    """MLX's CPU device gathers no other type."""
    assert x.dtype == weight.dtype
    product = gather_mm(x.astype(mx.float32), weight.astype(mx.float32), **options)
    return product.astype(x.dtype)


def forget() -> None:
    for cached in (source.kernel, proof.matrix_failure, proof.attention_failure):
        cached.cache_clear()


def near(actual: Any, expected: Any, bound: float = 2e-5) -> None:
    actual = np.array(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


def values(kind: GGMLType, blocks: NDArray[np.uint8]) -> Floats:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))


# ---- matrices ----


def test_the_kernels_read_what_mlx_has_no_form_for() -> None:
    assert {*BLOCKS} == {kind for kind in QUANTIZED if not has_form(kind)}


@each_block
def test_lookup(kind: GGMLType) -> None:
    """The rows of the file; float32 is exact but for how products are rounded."""
    blocks = random_blocks(kind, 9, 512)
    rows = MetalMatrix(kind, mx.array(blocks)).lookup(mx.array([8, 0, 5]))
    assert rows.dtype == mx.float32
    near(rows, values(kind, blocks)[[8, 0, 5]], 1e-6)


@each_block
@pytest.mark.parametrize("n", [1, FEW, FEW + 1])
def test_products(kind: GGMLType, n: int, metal: MetalEmulator) -> None:
    """A few rows are multiplied in float32, many in float16."""
    bound = 2e-5 if n <= FEW else 2e-3
    blocks = random_blocks(kind, 3, 21, 512)
    right = values(kind, blocks).astype(np.float64)
    x = rng(3).standard_normal((3, n, 512)).astype(np.float32)
    single, stack = MetalMatrix(kind, mx.array(blocks[2])), MetalMatrix(kind, mx.array(blocks))
    near(single(mx.array(x[0])), x[0] @ right[2].T, bound)
    near(single.plus(mx.ones((n, 21)), mx.array(x[0])), 1 + x[0] @ right[2].T, bound)
    near(stack(mx.array(x)), x @ right.transpose(0, 2, 1), bound)
    used = "convert" if n > FEW else "multiply"
    assert {name.split("__")[0] for name in metal.launched} == {
        f"custom_kernel_localds_{used}_{kind.name}"
    }


@each_block
@pytest.mark.parametrize(("matrices", "n", "bound"), [(3, 9, 2e-5), (3, 70, 2e-3), (12, 70, 2e-5)])
def test_chosen(kind: GGMLType, matrices: int, n: int, bound: float) -> None:
    """Rows of x that lie apart, too: MLX takes them from the wrong places if it is let."""
    blocks = random_blocks(kind, matrices, 5, 256)
    ids = np.sort(rng(5).integers(0, matrices, n)).astype(np.uint32)
    x = rng(6).standard_normal((256, n)).astype(np.float32).T
    expected = np.einsum("nc,nrc->nr", x, values(kind, blocks)[ids].astype(np.float64))
    found = MetalMatrix(kind, mx.array(blocks)).chosen(mx.array(x.T).T, mx.array(ids))
    near(found, expected, bound)


def test_large_stacks_are_written_out_in_slices(
    metal: MetalEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three slices, the second is not asked for."""
    kind = GGMLType.IQ4_NL
    blocks = random_blocks(kind, 5, 6, 64)
    ids = np.repeat([0, 1, 4], [30, 25, 15]).astype(np.uint32)
    x = rng(6).standard_normal((70, 64)).astype(np.float32)
    monkeypatch.setattr(written, "SLICE_BYTES", 2 * 6 * 64 * 2)  # matrices of float16
    found = MetalMatrix(kind, mx.array(blocks)).chosen(mx.array(x), mx.array(ids))
    near(found, np.einsum("nc,nrc->nr", x, values(kind, blocks)[ids].astype(np.float64)), 2e-3)
    assert len(metal.launched) == 2


@each_block
def test_put(kind: GGMLType) -> None:
    blocks = random_blocks(kind, 4, 5, 256)
    one = MetalMatrix(kind, mx.array(blocks[3]))
    stack = MetalMatrix(kind, mx.array(blocks[:3])).put(1, one)
    assert [array.shape for array in stack.arrays()] == [(3, *blocks.shape[1:])]
    ids = np.array([0, 1, 2], np.uint32)
    x = rng(6).standard_normal((3, 256)).astype(np.float32)
    expected = np.einsum("nc,nrc->nr", x, values(kind, blocks)[[0, 3, 2]])
    near(stack.chosen(mx.array(x), mx.array(ids)), expected)


def test_the_backend_takes_kernels_only_for_what_mlx_has_no_form_for() -> None:
    backend = MetalBackend()
    for kind, form in {
        GGMLType.F16: PlainMatrix,
        GGMLType.Q4_K: PackedMatrix,
        GGMLType.MXFP4: PackedMatrix,
        GGMLType.IQ4_NL: MetalMatrix,
    }.items():
        rows = np.zeros((2, 256 // kind.block_elements * kind.block_bytes), np.uint8)
        assert type(backend.load(kind, rows)) is form
        assert backend.device_bytes(kind, rows.nbytes) > 0


# ---- attention ----


def cached_rows(kind: GGMLType, length: int, reserved: int, width: int) -> tuple[Any, Floats]:
    """Rows as the cache keeps them, NaN or 0xFF after `length`, and the values of the others."""
    random = rng(11).standard_normal((length, width)).astype(np.float32)
    kept = np.array(encoded(mx.array(random), kind))
    rest = np.full((reserved - length, kept.shape[1]), 0xFF, np.uint8)
    if kind is GGMLType.Q8_0:
        return mx.array(np.concatenate([kept, rest])), values(kind, kept)
    rest = np.full(rest.shape, np.nan, kept.dtype)
    return mx.array(np.concatenate([kept, rest])), kept.astype(np.float32)


@each_row
@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize(("length", "reserved"), [(1, 40), (33, 40), (64, 64), (130, 1024)])
def test_attention(kind: GGMLType, heads: int, length: int, reserved: int) -> None:
    rows, floats = cached_rows(kind, length, reserved, 128)
    q = rng(12).standard_normal((heads, 128)).astype(np.float32) / 4
    scores = q.astype(np.float64) @ floats.T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights @ floats[:, :64] / weights.sum(axis=1, keepdims=True)
    past = mx.array([length - 1], mx.int32)
    near(attend_one(mx.array(q), rows, kind, past, 64), expected)


SHAPE = MlaShape(
    heads=4,
    nope=32,
    rope_width=64,
    value=32,
    kv_rank=128,
    softmax_scale=0.2,
    eps=EPS,
    latent_eps=0.01,
    rope=rope(32),
)


@each_row
@pytest.mark.parametrize("known", [True, False], ids=["known", "any position"])
def test_the_attention_layer(kind: GGMLType, known: bool, metal: MetalEmulator) -> None:
    """As MLX's own operations compute it: a prompt, then tokens one by one."""
    weights = mla_weights(SHAPE)
    results = []
    for backend in (PORTABLE, MetalBackend()):
        layer = MlxOps(backend).mla(mla_tensors(weights, SHAPE, legacy=False), SHAPE)
        rows = DeviceRows(mx.zeros((0, columns(kind)), DTYPES[kind]), kind, 192, 64)
        rows.reserve(64)
        random = rng(13)
        parts = [layer(mx.array(hidden_states(random, 6)), rows, 0)]
        for past in (6, 7):
            at = past if known else mx.array([past], mx.int32)
            parts.append(layer(mx.array(hidden_states(random, 1)), rows, at))
        results.append(np.concatenate([np.array(part) for part in parts]))
    near(results[1], results[0])
    assert f"attend_{kind.name}" in " ".join(metal.launched)


def columns(kind: GGMLType) -> int:
    return 192 // 32 * 34 if kind is GGMLType.Q8_0 else 192


# ---- proofs ----


def test_all_kernels_prove_themselves() -> None:
    assert proof.failures() == {}


SABOTAGE = {
    "wrong scale": ("blocks.metal", "const float d = ", "const float d = 2 * "),
    "no sum over lanes": ("matrix.metal", "sums[r] = simd_sum(sums[r])", "sums[r] = sums[r]"),
    "nothing written": ("matrix.metal", "out[j] = ", "vec<T, 4> lost = "),
}


@pytest.mark.parametrize(("file", "part", "wrong"), SABOTAGE.values(), ids=SABOTAGE)
def test_wrong_kernels_of_blocks_are_found(
    file: str, part: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, file, part, wrong)
    assert "wrong results of" in proof.matrix_failure(GGMLType.IQ4_NL)
    rows = np.zeros((2, 18), np.uint8)
    assert type(MetalBackend().load(GGMLType.IQ4_NL, rows)) is BlockMatrix


ATTENTION_SABOTAGE = {
    "not the largest score": ("max(top, score[i])", "score[i]"),
    "one row less": ("past[0] + 1", "past[0]"),
    "no sum": ("sum += weight", "sum += 0"),
    "parts of other heads": ("state[2 * at] - largest", "state[2 * p] - largest"),
}


@pytest.mark.parametrize(("part", "wrong"), ATTENTION_SABOTAGE.values(), ids=ATTENTION_SABOTAGE)
def test_wrong_attention_is_found(part: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, "attention.metal", part, wrong)
    reason = proof.attention_failure(GGMLType.F16, 192, 128)
    assert reason == "wrong results of attend"


def test_what_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, "blocks.metal", "const float d = ", "const floa d = ")
    sabotage(monkeypatch, "attention.metal", "past[0]", "future[0]")
    found = proof.failures()
    assert {*found} == {f"{kind.name} blocks" for kind in BLOCKS} | {
        f"attention over {kind.name} rows" for kind in ROWS
    }
    assert all("does not compile" in reason for reason in found.values())


def test_without_metal_mlx_serves(monkeypatch: pytest.MonkeyPatch, metal: MetalEmulator) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", metal.real)
    assert "No Metal back-end" in proof.failures()["Q6_K blocks"]
    assert "no kernels for rows of 32 + 8 values" in proof.attention_failure(GGMLType.F16, 40, 32)
    assert type(MetalBackend().load(GGMLType.Q6_K, np.zeros((2, 210), np.uint8))) is BlockMatrix


def sabotage(monkeypatch: pytest.MonkeyPatch, file: str, part: str, wrong: str) -> None:
    """Change all sources' parts that come from `file`."""
    real = source._sections

    def changed(name: str) -> dict[str, str]:
        if name != file:
            return real(name)
        whole = {key: text.replace(part, wrong) for key, text in real(name).items()}
        assert whole != real(name)
        return whole

    monkeypatch.setattr(source, "_sections", changed)


# ---- a model ----


def test_a_model(tmp_path: Path, metal: MetalEmulator) -> None:
    """As MLX computes with the same values in float32; many tokens at once in float16."""
    ids = golden("v2-lite")[0][:14]
    path, plain = tmp_path / "quantized.gguf", tmp_path / "plain.gguf"
    requantize(convert_variant("v2-lite", tmp_path), path, plain, GGMLType.IQ4_NL)
    expected = run(plain, PORTABLE, ids, [14])
    near(run(path, MetalBackend(), ids[:5], [3, 4, 5]), expected[:5])
    assert mean_kl(expected, run(path, MetalBackend(), ids, [13, 14])) < 1e-4
    assert {name.split("__")[0] for name in metal.launched} >= {
        "custom_kernel_localds_multiply_IQ4_NL",
        "custom_kernel_localds_convert_IQ4_NL",
    }


def run(path: Path, backend: Backend, ids: list[int], steps: list[int]) -> Floats:
    """Logits of all `ids`, in pieces that end at `steps`."""
    with GGUFFile.open(path) as model:
        decoder = build_decoder(model, backend, mx.new_thread_unsafe_stream(mx.cpu))
        cache = decoder.new_cache(32, "f32")
        parts = [
            decoder.forward(np.asarray(ids[start:end], np.int32), cache, last_only=False)
            for start, end in pairwise([0, *steps])
        ]
    return np.concatenate(parts)


def requantize(origin: Path, quantized: Path, plain: Path, kind: GGMLType) -> None:
    """Write the file with all matrices that fit in `kind`, and with their values in float32."""
    rounded: dict[str, Floats] = {}
    writer = copied_metadata(origin, quantized)
    for stored in gguf.GGUFReader(origin).tensors:
        data = np.array(stored.data)
        if data.ndim > 1 and "gate_inp" not in stored.name and data.shape[-1] % 32 == 0:
            blocks = _native.quantize(int(kind), data.reshape(-1, data.shape[-1]))
            blocks = blocks.reshape(*data.shape[:-1], -1)
            rounded[stored.name] = values(kind, blocks)
            writer.add_tensor(stored.name, blocks, raw_dtype=gguf.GGMLQuantizationType(kind))
        else:
            writer.add_tensor(stored.name, data)
    assert len(rounded) > 10
    finish(writer)
    rewrite(origin, plain, {}, lambda tensors: tensors | rounded)

"""The CUDA backend with its kernels run by the emulator: against gguf and MLX's operations."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import gguf
import gguf.quants
import numpy as np
import pytest
from layer_cases import MLA, hidden_states, matrix, mla_tensors, mla_weights, rng, rope
from lockstep import COMPILER, NO_COMPILER, Lockstep
from test_ops_mlx import ROUTERS, near, random_blocks

from localds.gguf import GGMLType
from localds.ops import Gating

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from cuda_emulator import emulated_cuda, forget_proofs  # noqa: E402

from localds.ops.mlx import MlxOps, written  # noqa: E402
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.blocks import QUANTIZED  # noqa: E402
from localds.ops.mlx.cache import DeviceRows, decoded, encoded  # noqa: E402
from localds.ops.mlx.cuda import CudaBackend, proof, source  # noqa: E402
from localds.ops.mlx.cuda.latent import CACHED, Latents, prepare  # noqa: E402
from localds.ops.mlx.cuda.matrix import (  # noqa: E402
    FEWER_TOGETHER,
    MORE_TOGETHER,
    CudaMatrix,
)
from localds.ops.mlx.cuda.routing import route  # noqa: E402
from localds.ops.mlx.feed_forward import Gated  # noqa: E402
from localds.ops.mlx.matrix import PLAIN, portable_matrix  # noqa: E402
from localds.ops.mlx.routing import MlxRouter, choose_experts  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from localds.ops import Router

    Floats = NDArray[np.float32]

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

BACKEND = CudaBackend()
KINDS = (*QUANTIZED, *PLAIN)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The names of the kernels that ran."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    with emulated_cuda(Lockstep(tmp_path_factory.mktemp("cuda"))) as launched:
        yield launched
    mx.set_default_device(before)


@pytest.fixture
def launched(kernels: list[str]) -> list[str]:
    """The names of those that this test ran."""
    kernels.clear()
    return kernels


def values_of(kind: GGMLType, blocks: NDArray[np.uint8]) -> Floats:
    values: Floats = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    return values.reshape(*blocks.shape[:-1], -1)


def blocks_of(kind: GGMLType, *shape: int) -> NDArray[np.uint8]:
    """Blocks [..., rows, bytes] of any bits, or of plain floats."""
    if kind not in PLAIN:
        return random_blocks(kind, *shape)
    values = rng(7).standard_normal(shape).astype(np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind)).view(np.uint8)
    return np.ascontiguousarray(blocks)


# ---- matrices ----


@each_kind
def test_products(kind: GGMLType, launched: list[str]) -> None:
    """An odd number of rows, of which a warp does two at once; a stack, and one of it."""
    blocks = blocks_of(kind, 3, 9, 512)
    values = values_of(kind, blocks).astype(np.float64)
    stack, one = BACKEND.load(kind, blocks), BACKEND.load(kind, blocks[1])
    launched.clear()
    x = rng(3).standard_normal((3, 2, 512)).astype(np.float32)
    near(stack(mx.array(x)), x @ values.transpose(0, 2, 1), 2e-6)
    near(one(mx.array(x[0])), x[0] @ values[1].T, 2e-6)
    ids = np.array([2, 0], np.uint32)
    expected = np.einsum("nc,nrc->nr", x[0], values[ids])
    near(stack.chosen(mx.array(x[0]), mx.array(ids)), expected, 2e-6)
    residual = rng(4).standard_normal((2, 9)).astype(np.float32)
    sums = residual + x[0] @ values[1].T
    near(one.plus(mx.array(residual), mx.array(x[0])), sums, 2e-6)
    assert launched == ["multiply"] * 3 + ["combined"]


@each_kind
def test_rows_are_read_exactly(kind: GGMLType) -> None:
    blocks = blocks_of(kind, 9, 512)
    rows = BACKEND.load(kind, blocks).lookup(mx.array([8, 0, 5]))
    assert rows.dtype == mx.float32
    assert (np.array(rows) == values_of(kind, blocks)[[8, 0, 5]]).all()


@each_kind
def test_many_rows_are_multiplied_in_float16(kind: GGMLType) -> None:
    blocks = blocks_of(kind, 10, 256)
    x = rng(3).standard_normal((20, 256)).astype(np.float32)
    product = BACKEND.load(kind, blocks)(mx.array(x))
    near(product, x @ values_of(kind, blocks).T, 2e-3)


def test_large_matrices_are_written_out_in_slices(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(GGMLType.Q4_K, 10, 256)
    product = BACKEND.load(GGMLType.Q4_K, blocks)
    launched.clear()
    monkeypatch.setattr(written, "SLICE_BYTES", 4 * 256 * 2)  # rows of float16
    x = rng(3).standard_normal((20, 256)).astype(np.float32)
    near(product(mx.array(x)), x @ values_of(GGMLType.Q4_K, blocks).T, 2e-3)
    assert launched == ["convert"] * 3


@each_kind
@pytest.mark.parametrize("together", [FEWER_TOGETHER, MORE_TOGETHER])
def test_rows_that_a_warp_does_together(kind: GGMLType, together: int) -> None:
    """One row is left over."""
    blocks = blocks_of(kind, 2, 9, 512)
    stack = CudaMatrix(kind, mx.array(blocks))
    x = rng(3).standard_normal((2, 512)).astype(np.float32)
    found = stack.multiplied(mx.array(x), mx.array([1, 0], mx.uint32), together)
    expected = np.einsum("nc,nrc->nr", x, values_of(kind, blocks)[::-1].astype(np.float64))
    near(found, expected, 2e-6)


@each_kind
def test_experts(kind: GGMLType, launched: list[str]) -> None:
    """Two tokens' experts and their weighted sum, in two kernels."""
    tensors = [blocks_of(kind, 4, 256, 256)[:, :rows] for rows in (256, 256, 24)]
    tensors[1] = np.ascontiguousarray(tensors[1][:, ::-1])
    gate, up, down = (values_of(kind, t).astype(np.float64) for t in tensors)
    # Sizes at which silu bends.
    size = 2 / np.abs(gate[0] @ rng(3).standard_normal(256)).max()
    x = (rng(3).standard_normal((2, 256)) * size).astype(np.float32)
    ids, weights = np.array([[1, 3], [0, 3]], np.uint32), np.array([[0.5, 2], [1.5, -1]])
    layer = BACKEND.gated(*[BACKEND.load(kind, np.ascontiguousarray(t)) for t in tensors])

    launched.clear()
    g = np.einsum("nc,nkrc->nkr", x, gate[ids])
    middle = g / (1 + np.exp(-g)) * np.einsum("nc,nkrc->nkr", x, up[ids])
    sums = (np.einsum("nkr,nkor->nko", middle, down[ids]) * weights[..., None]).sum(1)
    residual = np.full((2, 24), np.abs(sums).max(), np.float32)
    added = layer.plus_chosen(
        mx.array(residual), mx.array(x), mx.array(ids), mx.array(weights, mx.float32)
    )
    near(added, residual + sums, 1e-5)
    assert launched == ["gated", "combined"]


def test_experts_of_many_tokens() -> None:
    """Brought together by expert. MLX's CPU device gathers only what is written in float32."""
    kind = GGMLType.F32
    tensors = [blocks_of(kind, 4, *shape) for shape in [(64, 64), (64, 64), (32, 64)]]
    x = mx.array(rng(5).standard_normal((40, 64)).astype(np.float32) / 50)
    ids = mx.array(rng(6).integers(0, 4, (40, 2)).astype(np.uint32))
    weights, residual = mx.array(rng(7).random((40, 2)).astype(np.float32)), mx.zeros((40, 32))
    ours = BACKEND.gated(*[BACKEND.load(kind, t) for t in tensors])
    theirs = Gated(*[portable_matrix(kind, t) for t in tensors])
    near(
        ours.plus_chosen(residual, x, ids, weights),
        np.array(theirs.plus_chosen(residual, x, ids, weights)),
    )


def test_put_replaces_one_matrix() -> None:
    blocks = blocks_of(GGMLType.Q5_0, 5, 9, 64)
    stack = BACKEND.load(GGMLType.Q5_0, blocks[:4]).put(2, BACKEND.load(GGMLType.Q5_0, blocks[4]))
    assert isinstance(stack, CudaMatrix)
    assert (np.array(stack.arrays()[0]) == blocks[[0, 1, 4, 3]]).all()
    values = values_of(GGMLType.Q5_0, blocks[[0, 1, 4, 3]])
    x = np.ones((4, 1, 64), np.float32)
    near(stack(mx.array(x)), x @ values.transpose(0, 2, 1))


def test_device_bytes_are_those_of_the_file() -> None:
    assert BACKEND.device_bytes(GGMLType.Q8_0, 3400) == 3400


# ---- attention ----

SHAPE = replace(
    MLA, heads=8, nope=32, rope_width=64, value=32, kv_rank=128, rope=rope(32), softmax_scale=0.1
)
RESERVED = 300


@cache
def layers(heads: int) -> tuple[Callable[..., Any], ...]:
    """The layer by own kernels, and by MLX's operations."""
    shape = replace(SHAPE, heads=heads)
    tensors = mla_tensors(mla_weights(shape), shape, legacy=False)
    made = [MlxOps(backend).mla(tensors, shape) for backend in (BACKEND, PORTABLE)]
    for layer in made:
        layer.turns.reserve(RESERVED)
    return tuple(made)


@pytest.mark.parametrize("heads", [3, 8])
@pytest.mark.parametrize("kind", CACHED, ids=lambda kind: kind.name)
def test_attention(kind: GGMLType, heads: int, launched: list[str]) -> None:
    """At the first row, in the middle of a part, where one begins, and at the last row."""
    width = SHAPE.kv_rank + SHAPE.rope_width
    base = encoded(mx.array(rng(1).standard_normal((RESERVED, width)).astype(np.float32)), kind)
    for past in (0, 45, 60, RESERVED - 1):
        x = mx.array(hidden_states(rng(past), 1))
        results, rows = [], []
        for layer in layers(heads):
            rows.append(DeviceRows(base, kind, width))
            results.append(layer(x, rows[-1], mx.array([past], mx.int32)))
        near(results[0], np.array(results[1]), 1e-5)
        written, expected = (np.array(decoded(r.rows, mx.float32))[past] for r in rows)
        # Values at the edge of a step may be rounded to either side.
        step = {GGMLType.F32: 1e-6, GGMLType.F16: 1e-3, GGMLType.Q8_0: 1 / 127}[kind]
        near(written, expected, step)
        others = np.arange(RESERVED) != past
        assert (np.array(rows[0].rows)[others] == np.array(base)[others]).all()
    for name in ("prepare", "attend", "merge"):
        assert launched.count(name) >= 4


def test_attention_takes_mlx_where_kernels_do_not_fit(launched: list[str]) -> None:
    """Rows of 56 and 8 values."""
    tensors = mla_tensors(mla_weights(MLA), MLA, legacy=False)
    ours, theirs = (MlxOps(backend).mla(tensors, MLA) for backend in (BACKEND, PORTABLE))
    x = mx.array(hidden_states(rng(), 1))
    results = []
    for layer in (ours, theirs):
        layer.turns.reserve(16)
        rows = DeviceRows(mx.zeros((16, 64)), GGMLType.F32, 64)
        results.append(layer(x, cast("Any", rows), mx.array([3], mx.int32)))
    near(results[0], np.array(results[1]))
    assert "attend" not in launched


def test_q8_0_rows_have_the_bytes_of_ggml() -> None:
    """For the values that a float32 row holds; some blocks are all zeros, some tiny."""
    g = Latents(GGMLType.F32, heads=1, query=96, rank=128, rope=64)
    random = rng(11)
    for past in range(6):
        kv = random.standard_normal((1, 192)).astype(np.float32)
        kv[0, 32:64] = 0
        kv[0, 64:96] *= 1e-4
        arguments = (
            mx.array(kv),
            mx.zeros((1, 96)),
            mx.array(random.uniform(0.5, 1.5, 128).astype(np.float32)),
            mx.array(random.standard_normal((2, 6, 32)).astype(np.float32)),
            mx.array([past], mx.int32),
            1e-6,
        )
        floats, blocks = (
            np.array(prepare(replace(g, type=kind), *arguments)[0])
            for kind in (GGMLType.F32, GGMLType.Q8_0)
        )
        expected = gguf.quants.quantize(floats.view(np.float32), gguf.GGMLQuantizationType.Q8_0)
        assert (blocks == expected).all()


# ---- routing ----


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_routing(router: Router) -> None:
    logits = mx.array(rng(1).standard_normal((5, 16)).astype(np.float32) * 2)
    bias = mx.array(rng(2).standard_normal(16).astype(np.float32) / 4)
    for added in (None, bias):
        ids, weights = route(logits, added, router)
        right_ids, right = choose_experts(logits, added, router)
        assert ids.dtype == mx.uint32
        assert (np.array(ids) == np.array(right_ids)).all()
        near(weights, np.array(right), 1e-6)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_equal_scores_go_to_the_first_experts(router: Router) -> None:
    logits = np.zeros((2, 16), np.float32)
    logits[1, [5, 9, 13]] = 1  # equal ones among others
    ids, weights = (np.array(a) for a in route(mx.array(logits), None, router))
    assert (ids[0] == [0, 1, 2]).all()
    # Groups of 4, of which two are used: those of 5 and 9.
    assert (ids[1] == ([5, 9, 13] if router.groups == 1 else [5, 9, 4])).all()
    right = choose_experts(mx.array(logits), None, router)[1]
    near(weights, np.array(right), 1e-6)


def test_experts_of_no_number_are_not_chosen() -> None:
    router = ROUTERS[f"{Gating.SIGMOID}, groups 1, max"]
    logits = np.zeros((1, 16), np.float32)
    logits[0, [0, 2]] = np.nan
    ids, _ = route(mx.array(logits), None, router)
    assert np.array(ids).tolist() == [[1, 3, 4]]


def test_router_multiplies_by_the_kernel(launched: list[str]) -> None:
    router = ROUTERS[f"{Gating.SIGMOID}, groups 4, max"]
    weight, h = matrix(rng(1), 16, 64), hidden_states(rng(2), 20)
    ids, weights = BACKEND.router(router, mx.array(weight), None)(mx.array(h))
    right_ids, right = choose_experts(mx.array(h @ weight.T), None, router)
    assert (np.array(ids) == np.array(right_ids)).all()
    near(weights, np.array(right))
    assert launched[-2:] == ["multiply", "route"]


# ---- proofs ----


def test_all_kernels_prove_themselves() -> None:
    assert proof.failures() == {}


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Replaces a text in the sources of all kernels that have it."""
    original = source.source

    def apply(old: str, new: str) -> None:
        def changed(*arguments: object) -> str:
            return original(*arguments).replace(old, new)  # type: ignore[arg-type]

        monkeypatch.setattr(source, "source", changed)
        forget_proofs()

    yield apply
    monkeypatch.undo()
    forget_proofs()


SMALL = partial(Latents, heads=8, query=192, rank=128, rope=64)
SABOTAGE = {
    "wrong bits": ("v & 15", "v & 7", GGMLType.Q4_K, "multiply, combined, gated, convert"),
    "wrong sign": ("total += weights[m]", "total -= weights[m]", GGMLType.Q8_0, "of combined"),
    "outside": ("w + min(r", "w - 1000000 + min(r", GGMLType.F16, "leaves its buffers"),
    "misaligned": ("load<2, 4>(b", "load<4, 4>(b", GGMLType.Q4_0, "misaligned"),
    "not C++": ("sums[r] = 0;", "sums[r] = nil;", GGMLType.Q6_K, "does not compile"),
    "a missing scale": (".x *= scale", ".x *= 1", SMALL(GGMLType.F16), "of attend"),
    "a sign lost": ("fabsf(v)", "v", SMALL(GGMLType.Q8_0), "of prepare"),
    "one row less": ("past[0] + 1", "past[0]", SMALL(GGMLType.F32), "of attend"),
    "no barrier": ("__syncwarp();", "", SMALL(GGMLType.F16), "of prepare"),
    "too many groups": ("better >= ", "better > ", proof.ROUTERS[1], "of route"),
    "later experts": ("other_id < id", "other_id > id", proof.ROUTERS[0], "of equal scores"),
}


@pytest.mark.parametrize(("old", "new", "subject", "reason"), SABOTAGE.values(), ids=SABOTAGE)
def test_broken_kernels_are_found_out(
    sabotage: Callable[[str, str], None],
    old: str,
    new: str,
    subject: GGMLType | Latents | Router,
    reason: str,
) -> None:
    def failure() -> str:
        if isinstance(subject, GGMLType):
            return proof.matrix_failure(subject)
        if isinstance(subject, Latents):
            return proof.attention_failure(subject)
        return proof.routing_failure(subject)

    assert failure() == ""
    sabotage(old, new)
    assert reason in failure()


def test_mlx_computes_where_kernels_fail(
    sabotage: Callable[[str, str], None],
) -> None:
    sabotage("using uint32_t = unsigned", "using uint32_t = unsinged")
    blocks = blocks_of(GGMLType.Q4_0, 3, 64)
    x = np.ones((1, 64), np.float32)
    product = BACKEND.load(GGMLType.Q4_0, blocks)(mx.array(x))
    near(product, x @ values_of(GGMLType.Q4_0, blocks).T)
    # Of MLX's form: 32 values in 16 bytes, a scale and an offset.
    assert BACKEND.device_bytes(GGMLType.Q4_0, 18) == 24
    router = BACKEND.router(proof.ROUTERS[0], mx.zeros((64, 64)), None)
    assert isinstance(router, MlxRouter)
    failures = proof.failures()
    assert len(failures) == len(KINDS) + len(CACHED) + len(proof.ROUTERS)
    assert all("unsinged" in reason for reason in failures.values())

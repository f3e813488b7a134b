"""The operations on MLX's CPU device: against transformers, gguf's dequantizers and CpuOps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import gguf
import gguf.quants
import layer_oracle as oracle
import numpy as np
import pytest
from checkpoints import VARIANTS
from derive_gguf import _copy_field, rewrite
from divergence import mean_kl
from layer_cases import EPS, HIDDEN, hidden_states, moe_tensors, moe_weights, rng
from test_golden import DERIVED, assert_close, ggufs, golden

import localds
from localds.gguf import GGMLType, GGUFFile
from localds.memory.latents import ContextError
from localds.ops import Gating, GroupScore, Router
from localds.ops.tensors import COMPUTED
from localds.session import Session

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.ops.mlx import MlxOps, build_decoder  # noqa: E402
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.blocks import QUANTIZED, dequantize  # noqa: E402
from localds.ops.mlx_device import NoGpuError, find_gpu, open_gpu  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.ops.mlx.backend import Backend

    Floats = NDArray[np.float32]


DEVICES = ["cpu", "gpu"] if mx.is_available(mx.gpu) else ["cpu"]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """MLX's CPU device, and a GPU where there is one."""
    before = mx.default_device()
    mx.set_default_device(mx.gpu if request.param == "gpu" else mx.cpu)
    yield request.param
    mx.set_default_device(before)


def backend() -> Backend:
    return PORTABLE if mx.default_device() == mx.Device(mx.cpu) else open_gpu(find_gpu())[0]


def new_stream() -> Any:
    return mx.new_thread_unsafe_stream(mx.default_device())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF files by name, each made once."""
    return ggufs(tmp_path_factory.mktemp("mlx"))


def run(path: Path, ids: Sequence[int], steps: Sequence[int], cache_type: str = "f32") -> Floats:
    """Logits of all `ids` on MLX, in pieces that end at `steps`."""
    with GGUFFile.open(path) as model:
        decoder = build_decoder(model, backend(), new_stream())
        rows = decoder.new_cache(96, cache_type)
        parts = [
            decoder.forward(np.asarray(ids[start:end], np.int32), rows, last_only=False)
            for start, end in pairwise([0, *steps])
        ]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", [*VARIANTS, *DERIVED])
def test_golden_logits(files: Callable[[str], Path], name: str) -> None:
    """A long piece, then a short one, then token by token."""
    ids, expected = golden(DERIVED[name][0] if name in DERIVED else name)
    steps = [len(ids) - 12, len(ids) - 4, *range(len(ids) - 3, len(ids) + 1)]
    assert_close(run(files(name), ids, steps), expected)


def test_token_by_token(files: Callable[[str], Path]) -> None:
    """One graph serves all positions, with room for more rows than are used."""
    ids, expected = golden("v3")
    assert_close(run(files("v3"), ids, range(1, len(ids) + 1)), expected)


# ---- matrices ----

PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


def random_blocks(kind: GGMLType, *shape: int) -> NDArray[np.uint8]:
    """Blocks [..., rows, bytes] of any bits, but for float16 scales, which are finite."""
    *lead, columns = shape
    blocks = columns // kind.block_elements
    data = rng(7).integers(0, 256, (*lead, blocks, kind.block_bytes), dtype=np.uint8)
    if kind is GGMLType.MXFP4:
        data[..., 0] = rng(8).integers(100, 130, (*lead, blocks))
    for at in HALVES.get(kind, ()):
        scales = (rng(9 + at).standard_normal((*lead, blocks, 1)) / 64).astype(np.float16)
        data[..., at : at + 2] = scales.view(np.uint8)
    return data.reshape(*lead, -1)


# Where a block's float16 scales and minima lie.
HALVES = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
}


def test_every_computed_type_is_read() -> None:
    assert {*QUANTIZED, *PLAIN} == set(COMPUTED)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_blocks_are_read_exactly(kind: GGMLType) -> None:
    blocks = random_blocks(kind, 3, 512)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    assert (np.array(dequantize(kind, mx.array(blocks))) == expected).all()


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_matrices_lose_nothing(kind: GGMLType) -> None:
    """The rows of a matrix, in whatever form it is kept, are those of the file."""
    blocks = random_blocks(kind, 9, 512)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    rows = backend().load(kind, blocks).lookup(mx.array([8, 0, 5]))
    assert rows.dtype == mx.float32
    assert (np.array(rows) == expected[[8, 0, 5]]).all()


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n", [1, 3, 40])
def test_products(kind: GGMLType, n: int, device: str) -> None:
    # A GPU multiplies many rows in float16.
    bound = 2e-3 if device == "gpu" and n > 8 else 2e-5
    blocks = random_blocks(kind, 4, 24, 512)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind)).astype(np.float64)
    stack, single = backend().load(kind, blocks), backend().load(kind, blocks[2])
    x = rng(3).standard_normal((4, n, 512)).astype(np.float32)
    near(single(mx.array(x[0])), x[0] @ values[2].T, bound)
    near(single.plus(mx.ones((n, 24)), mx.array(x[0])), 1 + x[0] @ values[2].T, bound)
    near(stack(mx.array(x)), x @ values.transpose(0, 2, 1), bound)
    ids = np.sort(rng(5).integers(0, 4, n)).astype(np.uint32)
    expected = np.einsum("nc,nrc->nr", x[1], values[ids])
    near(stack.chosen(mx.array(x[1]), mx.array(ids)), expected, bound)


def test_large_matrices_are_repacked_in_parts(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("localds.ops.mlx.matrix.REPACKED_AT_ONCE", 5 * 256)
    blocks = random_blocks(GGMLType.Q4_K, 3, 7, 256)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(GGMLType.Q4_K))
    stack = backend().load(GGMLType.Q4_K, blocks)
    identity = mx.broadcast_to(mx.eye(256), (3, 256, 256))
    near(stack(identity), expected.transpose(0, 2, 1), 2e-3 if device == "gpu" else 2e-5)


def near(actual: Any, expected: Any, bound: float = 2e-5) -> None:
    actual = np.array(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


# ---- mixtures of experts ----

ROUTERS = {
    f"{gating}, groups {groups}, {score}": Router(
        n_experts=16,
        top_k=3,
        gating=gating,
        normalize=gating is not Gating.SOFTMAX,
        scale=1.5,
        groups=groups,
        groups_used=2 if groups > 1 else 1,
        group_score=score,
    )
    for gating, groups, score in product(Gating, (1, 4), GroupScore)
}


@pytest.mark.parametrize("n", [1, 50])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_moe(router: Router, n: int) -> None:
    w = moe_weights(16, bias=True, shared=True)
    layer = MlxOps(backend()).moe(moe_tensors(w), router, EPS)
    x = hidden_states(rng(), n)
    near(layer(mx.array(x)), oracle.moe(x.astype(np.float64), w, router, EPS))


def test_equal_scores_go_to_the_first_experts_and_groups() -> None:
    router = replace(ROUTERS["sigmoid, groups 4, max"], top_k=6)
    w = moe_weights(16, bias=False, shared=False)
    w["router"][:] = 0
    routed = MlxOps(backend()).moe(moe_tensors(w), router, EPS).route(mx.ones((2, HIDDEN)))
    assert (np.array(routed.ids) == np.arange(6)).all()
    near(routed.weights, np.full((2, 6), 1.5 / 6))


# ---- quantized models ----


@pytest.mark.parametrize(
    "kind", [GGMLType.Q8_0, GGMLType.Q5_0, GGMLType.Q4_0], ids=lambda k: k.name
)
@pytest.mark.parametrize("name", ["v2-lite", "v3", "mixtral"])
def test_quantized_models(
    files: Callable[[str], Path], tmp_path: Path, name: str, kind: GGMLType, device: str
) -> None:
    """As the CPU path computes with the same values in float32, which it does not round."""
    ids, _ = golden(name)
    quantized, plain = tmp_path / "quantized.gguf", tmp_path / "plain.gguf"
    requantize(files(name), quantized, plain, kind)
    with localds.load(plain) as model:
        expected = model.logits(ids)
    logits = run(quantized, ids, [40, len(ids) - 1, len(ids)])
    if device == "cpu":
        assert_close(logits, expected)
    else:
        assert mean_kl(expected, logits) < 1e-3


def requantize(source: Path, quantized: Path, plain: Path, kind: GGMLType) -> None:
    """Write the file with all matrices that fit in `kind`, and with their values in float32."""
    values: dict[str, Floats] = {}
    writer = copied_metadata(source, quantized)
    for stored in gguf.GGUFReader(source).tensors:
        data = np.array(stored.data)
        matrix = data.ndim > 1 and "gate_inp" not in stored.name
        if matrix and data.shape[-1] % kind.block_elements == 0:
            ggml_type = gguf.GGMLQuantizationType(kind)
            blocks = gguf.quants.quantize(data, ggml_type)
            values[stored.name] = gguf.quants.dequantize(blocks, ggml_type)
            writer.add_tensor(stored.name, blocks, raw_dtype=ggml_type)
        else:
            writer.add_tensor(stored.name, data)
    assert len(values) > 10
    finish(writer)
    rewrite(source, plain, {}, lambda tensors: tensors | values)


def copied_metadata(source: Path, target: Path) -> gguf.GGUFWriter:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            _copy_field(writer, name, field)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_trained_quantized_model(guide_path: Path, tmp_path: Path, device: str) -> None:
    """As the CPU path computes in float32.

    On quantized weights, its kernels round what they multiply quantized weights with to 8 bits.
    """
    plain = tmp_path / "plain.gguf"
    writer = copied_metadata(guide_path, plain)
    for stored in gguf.GGUFReader(guide_path).tensors:
        writer.add_tensor(stored.name, gguf.quants.dequantize(stored.data, stored.tensor_type))
    finish(writer)
    with localds.load(guide_path) as model:
        ids = model.tokenizer.encode(TEXT)[:96]
        rounded = model.logits(ids)
    with localds.load(plain) as model:
        exact = model.logits(ids)
    logits = run(guide_path, ids, [60, *range(61, len(ids) + 1)])
    divergence = mean_kl(exact, logits)
    print(f"KL from float32: {divergence:.2e}; of the CPU's kernels: {mean_kl(exact, rounded):.2e}")
    assert divergence < (1e-6 if device == "cpu" else 1e-4)


TEXT = (
    "A model of mixed experts keeps most of its weights in experts, of which a router chooses a few"
    " for every token. localds reads the chosen ones from the disk where memory holds not all of"
    " them. To begin, pull a model by its name, and chat with it in the terminal."
)


# ---- sessions ----


def test_session_goes_back_and_on(tiny_model: Path) -> None:
    """The same text as on the CPU, also after going back to a prefix; the cache grows meanwhile."""
    with localds.load(tiny_model) as model:
        on_cpu = model.session(context=96, cache_type="f32")
        with GGUFFile.open(tiny_model) as file:
            decoder = build_decoder(file, backend(), new_stream())
            on_mlx = Session(decoder, model.tokenizer, model.template, 96, cache_type="f32")
            for prompt in ("abc def", "abc xyz", "abc def ghi"):
                expected = "".join(map(str, on_cpu.generate(prompt, max_tokens=12, temperature=0)))
                text = "".join(map(str, on_mlx.generate(prompt, max_tokens=12, temperature=0)))
                assert text == expected
            assert on_mlx.stats.reused_tokens > 0


def test_cache_grows_in_steps(
    files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localds.ops.mlx.cache.STEP", 20)
    ids, expected = golden("v2-lite")
    assert_close(run(files("v2-lite"), ids, [5, *range(6, len(ids) + 1)]), expected)


def test_more_than_the_context_is_refused(files: Callable[[str], Path]) -> None:
    with pytest.raises(ContextError, match="97 tokens do not fit"):
        run(files("v2-lite"), [1] * 97, [97])


@pytest.mark.parametrize(
    ("name", "cache_type", "tolerance"),
    [("v2-lite", "f16", 0.005), ("v2-lite", "q8_0", 0.1), ("v3", "q8_0", 0.1)],
)
def test_smaller_caches(
    files: Callable[[str], Path], name: str, cache_type: str, tolerance: float
) -> None:
    """Rounded rows move the logits a little, as they do on the CPU."""
    ids, expected = golden(name)
    logits = run(files(name), ids, [40, *range(41, len(ids) + 1)], cache_type)
    error = np.sqrt(np.mean((logits - expected) ** 2, axis=1))
    assert 0 < np.median(error) < tolerance * expected.std()


def test_ids_outside_the_vocabulary_are_refused(files: Callable[[str], Path]) -> None:
    for ids in ([1, 99999], [-1]):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            run(files("v2-lite"), ids, [len(ids)])


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(NoGpuError, match="mlx-cpu"):
        find_gpu()

"""Gradients in training, against finite differences and MLX's gradients of plain formulas."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import gguf
import gguf.quants
import lockstep
import numpy as np
import pytest
from layer_cases import rng
from test_finetune_model import Packed, difference, one_batch, open_model, shifted
from test_golden import convert_variant

from localds.finetune.config import TARGETS, AdapterConfig
from localds.gguf import GGMLType

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from cuda_emulator import emulated_cuda  # noqa: E402
from metal_emulator import MetalEmulator  # noqa: E402
from test_ops_mlx import random_blocks  # noqa: E402

from localds.finetune.model import (  # noqa: E402
    Adapter,
    Trained,
    feed_forward,
    matrices,
    slices,
)
from localds.finetune.model import attend as attending  # noqa: E402
from localds.finetune.model import head as heads  # noqa: E402
from localds.finetune.model.adapter import StackedLinear  # noqa: E402
from localds.finetune.model.frozen import (  # noqa: E402
    FrozenHeads,
    FrozenMatrix,
    FrozenStack,
)
from localds.finetune.model.matrices import (  # noqa: E402
    chosen_times,
    chosen_transposed,
    flattened,
)
from localds.ops.mlx.backend import PORTABLE  # noqa: E402
from localds.ops.mlx.blocks import QUANTIZED  # noqa: E402
from localds.ops.mlx.cuda.matrix import CudaMatrix  # noqa: E402
from localds.ops.mlx.matrix import PLAIN, PlainMatrix  # noqa: E402
from localds.ops.mlx.metal.matrix import MetalMatrix  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.finetune.model import Parameters, TrainModel

KINDS = (*QUANTIZED, *PLAIN)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """GGUF files by name, each made once."""
    folder = tmp_path_factory.mktemp("gradients")
    return cache(lambda name: convert_variant(name, folder))


# ---- parameters ----

CASES = [
    *[
        ("v2", method, target)
        for method in ("lora", "dora")
        for target in (
            "q_a_proj",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_b_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "experts",
            "router",
        )
    ],
    ("v2-lite", "lora", "q_proj"),
    *[
        ("v3", "lora", target)
        for target in ("q_b_proj", "kv_b_proj", "o_proj", "down_proj", "experts", "router")
    ],
    ("v3", "dora", "experts"),
    *[
        ("mixtral", "lora", target)
        for target in ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "router")
    ],
]


@pytest.mark.parametrize(("name", "method", "target"), CASES)
def test_finite_differences(
    files: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    method: Any,
    target: str,
) -> None:
    """Along a random direction of each kind of parameter."""
    config = AdapterConfig(rank=3, method=method, targets=(target,))
    model = open_model(files(name), config, aux_alpha=1)
    for seed in range(10):
        p, batch = shifted(model), one_batch(10, seed=seed)
        _, gradient = model.value_and_grad(p, batch)
        mx.eval(gradient)
        with monkeypatch.context() as patch:
            patch.setattr(Adapter, "gain", constant_lengths())
            model.loss(p, batch)
            kinds = ("a", "b", "m") if method == "dora" else ("a", "b")
            errors = [slope_error(model, p, gradient, batch, kind) for kind in kinds]
        if None not in errors:
            break
    assert None not in errors
    assert max(errors) < 0.01


def constant_lengths() -> Any:
    """DoRA's gain with the lengths of rows as they are when it is first asked for.

    The gradient takes them for constant, so that other differences would not meet it.
    """
    gain, lengths = Adapter.gain, {}

    def constant(self: Adapter, p: Any, frozen_a: Any) -> Any:
        if self.name not in lengths:
            lengths[self.name] = p["m"] / gain(self, p, frozen_a)
        return p["m"] / lengths[self.name]

    return constant


def slope_error(
    model: TrainModel, p: Parameters, gradient: Parameters, batch: Packed, kind: str
) -> float | None:
    """How much the gradient and differences disagree, relative to the gradient's length.

    None where the step changes the choice of an expert: there the loss has a jump.
    """
    random = rng(11)
    direction = {
        name: mx.array(random.standard_normal(values[kind].shape).astype(np.float32))
        for name, values in p.items()
    }
    slope = sum(float((gradient[name][kind] * d).sum()) for name, d in direction.items())
    length = np.sqrt(sum(float((gradient[name][kind] ** 2).sum()) for name in direction))
    # So that the loss changes by some 0.01: it has an error of 1e-5.
    step = 0.007 / length
    losses, loads = [], []
    for sign in (-1, 1):
        moved = {
            name: values | {kind: values[kind] + sign * step * direction[name]}
            for name, values in p.items()
        }
        loss, _, balance = model.loss(moved, batch)
        losses.append(float(loss))
        loads.append(np.array(balance.loads))
    if (loads[0] != loads[1]).any():
        return None
    return float(abs((losses[1] - losses[0]) / (2 * step) - slope) / length)


@pytest.mark.parametrize("name", ["v2-lite", "v3", "mixtral"])
def test_checkpointing_changes_no_gradient(files: Callable[[str], Path], name: str) -> None:
    found = []
    for checkpointing in (False, True):
        config = AdapterConfig(rank=2, targets=TARGETS, dropout=0.3)
        model = open_model(files(name), config, checkpointing=checkpointing)
        batch = one_batch(20, rows=2)
        (loss, _, _), gradient = model.value_and_grad(shifted(model), batch, mx.random.key(4))
        found.append((float(loss), gradient))
    assert found[0][0] == found[1][0]
    assert difference(found[1][1], found[0][1]) < 1e-6


# ---- frozen matrices ----


def values_of(kind: GGMLType, blocks: NDArray[np.uint8]) -> Any:
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    return values.astype(np.float32).reshape(*blocks.shape[:-1], -1)


def blocks_of(kind: GGMLType, *shape: int) -> NDArray[np.uint8]:
    """Blocks [..., rows, bytes] of any bits, or of plain floats."""
    if kind not in PLAIN:
        return random_blocks(kind, *shape)
    values = rng(7).standard_normal(shape).astype(np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind)).view(np.uint8)
    return np.ascontiguousarray(blocks)


def random_rows(*shape: int) -> Any:
    return mx.array(rng(2).standard_normal(shape).astype(np.float32))


def check(frozen: Callable[[Any], Any], plain: Callable[[Any], Any], x: Any) -> None:
    """Both functions of x and their gradients agree."""
    wanted = plain(x)
    cotangent = random_rows(*wanted.shape)
    near(frozen(x), wanted)
    for found, expected in zip(
        mx.vjp(frozen, [x], [cotangent])[1], mx.vjp(plain, [x], [cotangent])[1], strict=True
    ):
        near(found, expected)


def near(found: Any, expected: Any, bound: float = 2e-5) -> None:
    found, expected = np.array(found), np.array(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


@pytest.fixture(params=[1 << 28, 5 * 4 * 512], ids=["whole", "in slices"])
def sliced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "SLICE_BYTES", request.param)


@each_kind
@pytest.mark.usefixtures("sliced")
def test_matrices(kind: GGMLType) -> None:
    blocks = blocks_of(kind, 32, 512)
    values = mx.array(values_of(kind, blocks))
    frozen = FrozenMatrix(PORTABLE.load(kind, blocks))
    check(frozen, lambda x: x @ values.T, random_rows(9, 512))
    near(frozen.row_squares(), (values * values).sum(axis=1))


@each_kind
def test_stacks(kind: GGMLType) -> None:
    blocks = blocks_of(kind, 4, 32, 256)
    values = mx.array(values_of(kind, blocks))
    frozen = FrozenStack(PORTABLE.load(kind, blocks))
    ids = mx.array([0, 0, 1, 3, 3, 3], mx.uint32)
    check(
        lambda x: frozen(x, ids),
        lambda x: (x[:, None] @ values[ids].swapaxes(1, 2))[:, 0],
        random_rows(6, 256),
    )
    near(frozen.row_squares(), (values * values).sum(axis=2))
    x = random_rows(4, 3, 256)
    near(frozen.times_all(x), x @ values.swapaxes(1, 2))


@each_kind
def test_keys_and_values_of_heads(kind: GGMLType) -> None:
    heads, nope, value, rank = 3, 256, 32, 256
    keys, values = blocks_of(kind, heads, rank, nope), blocks_of(kind, heads, value, rank)
    k = mx.array(values_of(kind, keys)).swapaxes(1, 2)
    joint = mx.concatenate([k, mx.array(values_of(kind, values))], axis=1).reshape(-1, rank)
    loaded = PORTABLE.load(kind, keys), flattened(PORTABLE.load(kind, values))
    frozen = FrozenHeads(*loaded, heads)
    check(frozen, lambda x: x @ joint.T, random_rows(7, rank))
    near(frozen.row_squares(), (joint * joint).sum(axis=1))


def cuda_backend() -> Any:
    from localds.ops.mlx.cuda import CudaBackend

    return CudaBackend()


def metal_backend() -> Any:
    from localds.ops.mlx.metal import MetalBackend

    return MetalBackend()


@contextmanager
def emulated_metal(machine: lockstep.Lockstep) -> Iterator[None]:
    from localds.ops.mlx.metal import proof, source

    cached = source.kernel, proof.matrix_failure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", MetalEmulator(machine))
        for function in cached:
            function.cache_clear()
        yield
    for function in cached:
        function.cache_clear()


@contextmanager
def halves_gathered() -> Iterator[None]:
    """MLX's CPU device gathers no products in float16."""
    real = mx.gather_mm

    def in_float32(x: Any, weights: Any, **options: Any) -> Any:
        found = real(x.astype(mx.float32), weights.astype(mx.float32), **options)
        return found.astype(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "gather_mm", in_float32)
        yield


@pytest.mark.skipif(lockstep.COMPILER is None, reason=lockstep.NO_COMPILER)
@pytest.mark.skipif(mx.is_available(mx.gpu), reason="the emulators are for machines without a GPU")
@pytest.mark.parametrize(
    ("emulate", "backend", "kind"),
    [
        (emulated_cuda, cuda_backend, GGMLType.Q6_K),
        (emulated_cuda, cuda_backend, GGMLType.BF16),
        (emulated_metal, metal_backend, GGMLType.Q6_K),
    ],
)
def test_matrices_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulate: Any, backend: Any, kind: GGMLType
) -> None:
    """Blocks of the file, written out in float16, in slices; gradients of any size."""
    monkeypatch.setattr(matrices, "SLICE_BYTES", 20 * 4 * 256)
    blocks = blocks_of(kind, 3, 32, 256)
    values = mx.array(values_of(kind, blocks))
    ids = mx.array([0, 0, 2, 2, 2], mx.uint32)
    with emulate(lockstep.Lockstep(tmp_path)), halves_gathered():
        stack, one = (backend().load(kind, rows) for rows in (blocks, blocks[1]))
        assert isinstance(one, CudaMatrix | MetalMatrix)
        single, several = FrozenMatrix(one), FrozenStack(stack)
        x = random_rows(5, 256) * mx.array([[1e-9], [1], [1e6], [3], [0]])
        dy = random_rows(5, 32) * mx.array([[1e-9], [1], [1e6], [3], [0]])
        for frozen, weights in [
            (single, mx.broadcast_to(values[1], (5, 32, 256))),
            (lambda x: several(x, ids), values[ids]),
        ]:
            (y,), (dx,) = mx.vjp(frozen, [x], [dy])
            by_row(y, (x[:, None] @ weights.swapaxes(1, 2))[:, 0])
            by_row(dx, (dy[:, None] @ weights)[:, 0])
        near(several.row_squares(), (values * values).sum(axis=2), 1e-3)


def by_row(found: Any, expected: Any) -> None:
    for one, other in zip(np.array(found), np.array(expected), strict=True):
        assert np.abs(one - other).max() <= 2e-3 * np.abs(other).max()


# ---- attention and loss, in blocks ----


@pytest.mark.parametrize("queries", [1, 5, 64])
def test_attention_in_blocks(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    rows, length = 2, 13
    q, k = random_rows(rows, 6, length, 8), random_rows(rows, 2, length, 8)
    v = random_rows(rows, 2, length, 5)
    segments = mx.array([[1] * 6 + [2] * 7, [1] * 3 + [2] * 4 + [3] * 2 + [0] * 4])
    monkeypatch.setattr(attending, "SCORE_BYTES", queries * 4 * rows * 6 * length)

    def plain(q: Any, k: Any, v: Any) -> Any:
        keys, values = (mx.repeat(x, 3, axis=1) for x in (k, v))
        same = segments[:, :, None] == segments[:, None]
        seen = same & (mx.arange(length)[:, None] >= mx.arange(length))
        scores = mx.where(seen[:, None], q @ keys.swapaxes(2, 3), -mx.inf)
        return mx.softmax(scores, axis=-1) @ values

    def blocked(q: Any, k: Any, v: Any) -> Any:
        return attending.attend(q, k, v, segments)

    wanted, found = plain(q, k, v), blocked(q, k, v)
    near(found, wanted)
    cotangent = random_rows(*wanted.shape)
    for one, other in zip(
        mx.vjp(blocked, [q, k, v], [cotangent])[1],
        mx.vjp(plain, [q, k, v], [cotangent])[1],
        strict=True,
    ):
        near(one, other)


def test_attention_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores at once would take 16 MiB."""
    q, segments = random_rows(1, 4, 1024, 16), mx.ones((1, 1024), mx.int32)
    monkeypatch.setattr(attending, "SCORE_BYTES", 1 << 18)

    def loss(q: Any) -> Any:
        return (attending.attend(q, q, q, segments) ** 2).sum()

    mx.eval(q, segments)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss)(q))
    assert mx.get_peak_memory() - before < 12 << 20


@pytest.mark.parametrize("tokens", [3, 100])
def test_loss_in_parts(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    vocabulary, hidden = 96, 64
    blocks = blocks_of(GGMLType.Q8_0, vocabulary, hidden)
    values = mx.array(values_of(GGMLType.Q8_0, blocks))
    norm = 1 + random_rows(hidden) / 8
    head = heads.TrainHead(norm, PORTABLE.load(GGMLType.Q8_0, blocks), 1e-5)
    monkeypatch.setattr(heads, "LOGIT_BYTES", tokens * 4 * vocabulary)
    targets = mx.array(rng(1).integers(0, vocabulary, 10))
    weights = mx.array(rng(2).integers(0, 3, 10).astype(np.float32))

    def plain(x: Any) -> Any:
        logits = mx.fast.rms_norm(x, norm, 1e-5) @ values.T
        log = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return -(log[mx.arange(10), targets] * weights).sum()

    x = random_rows(10, hidden)
    wanted, slope = mx.value_and_grad(plain)(x)
    found, gradient = mx.value_and_grad(lambda x: 3 * head.loss(x, targets, weights))(x)
    near(found, 3 * wanted)
    near(gradient, 3 * slope)
    near(head.plain_loss(x, targets, weights), wanted)


# ---- feed-forward layers, some tokens at a time ----


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["v2-lite", "v3", "mixtral"])
@pytest.mark.parametrize(
    ("method", "targets"), [("lora", ("q_proj", "q_b_proj", "o_proj")), ("dora", TARGETS)]
)
def test_slices_of_tokens_change_nothing(
    files: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    method: Any,
    targets: tuple[str, ...],
    checkpointing: bool,
) -> None:
    """With and without adapters in them; the last slice is smaller."""
    config = AdapterConfig(rank=2, method=method, targets=targets)
    model = open_model(files(name), config, checkpointing=checkpointing, aux_alpha=1)
    p, batch, found = shifted(model), one_batch(19, rows=2), []
    for tokens in (100, 9):
        cut = partial(every, step=tokens)
        monkeypatch.setattr(feed_forward, "token_slices", cut)
        (loss, _, _), gradient = model.value_and_grad(p, batch)
        found.append((float(loss), gradient))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert difference(found[1][1], found[0][1]) < 1e-5


def every(n: int, _: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def test_slices_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "KEPT_BYTES", 1000)
    assert slices.token_slices(100, 10) == [slice(0, 100)]
    assert slices.token_slices(101, 10) == [slice(0, 51), slice(51, 101)]
    assert slices.token_slices(3, 5000) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_slices_drop_out_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "KEPT_BYTES", 50 * 10)
    adapter = Adapter("t", 1, (8, 8), 2, 1, 0.5, None)
    keys = mx.random.split(mx.random.key(1), 2)

    def run(x: Any) -> Any:
        return slices.in_slices(
            lambda _, rows, trained: adapter.dropped(rows[0], trained.dropout),
            slices.token_slices(len(x), 10),
            [x],
            Trained({}, keys),
        )

    x = mx.ones((100, 8))
    (found,), (slope,) = mx.vjp(run, [x], [x])
    one, other = np.array(found)[:50], np.array(found)[50:]
    assert 0.3 < (one != other).mean() < 0.7
    assert (np.array(slope) == np.array(found)).all()  # what dropped out has no gradient


@pytest.mark.parametrize("trains", [False, True])
def test_slices_take_less_memory(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    """The forward and the gradient of the experts of 512 tokens, each slice after the other."""
    n, k, count, hidden, width = 512, 4, 8, 64, 128
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    stacks, parameters = [], {}
    for number, (name, shape) in enumerate(shapes.items()):
        frozen = FrozenStack(PlainMatrix(random_rows(count, *shape) / 8))
        adapter = Adapter(name, number, (count, *shape), 2, 1, 0, None) if trains else None
        stacks.append(StackedLinear(frozen, adapter))
        if trains:
            parameters[name] = {
                "a": random_rows(count, 2, shape[1]),
                "b": random_rows(count, shape[0], 2),
            }
    experts = feed_forward.ResidentExperts(*stacks)
    ids = mx.array(np.stack([rng(i).permutation(count)[:k] for i in range(n)]).astype(np.uint32))
    h, weights = random_rows(n, hidden), random_rows(n, k)

    def run(h: Any, weights: Any, parameters: Any) -> Any:
        return (experts.mixed(h, ids, weights, Trained(parameters)) ** 2).sum()

    mx.eval(h, weights, ids, parameters, [s.frozen.stack.arrays() for s in stacks])
    peaks, gradients = [], []
    for parts in (1, 8):
        monkeypatch.setattr(slices, "KEPT_BYTES", n // parts * 12 * k * (hidden + width))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = mx.grad(run, argnums=(0, 1, 2))(h, weights, parameters)
        mx.eval(found)
        peaks.append(mx.get_peak_memory() - before)
        gradients.append(found)
    assert peaks[1] < 0.4 * peaks[0]
    near(gradients[1][0], gradients[0][0], 1e-6)
    near(gradients[1][1], gradients[0][1], 1e-6)
    assert not trains or difference(gradients[1][2], gradients[0][2]) < 1e-5


def test_parts_of_the_output_matrix_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is written out before its turn: one more would be there with each."""
    vocabulary, hidden, n = 8192, 512, 64
    output = PORTABLE.load(GGMLType.Q6_K, blocks_of(GGMLType.Q6_K, vocabulary, hidden))
    part = 4 * vocabulary * hidden // 4
    monkeypatch.setattr(matrices, "SLICE_BYTES", part)
    monkeypatch.setattr(heads, "LOGIT_BYTES", 4 * vocabulary * n // 4)
    head = heads.TrainHead(mx.ones(hidden), output, 1e-5)
    targets, weights = mx.array(rng(1).integers(0, vocabulary, n)), mx.ones(n)

    def run(x: Any) -> Any:
        return mx.grad(lambda x: head.loss(x, targets, weights))(x)

    # Writing one part out takes some four times its size.
    assert peak_of(run, random_rows(n, hidden)) < 5.1 * part


def test_stacks_wait() -> None:
    """None is written out again while what it is multiplied with is not there."""
    blocks = blocks_of(GGMLType.Q6_K, 4, 1024, 512)
    frozen = FrozenStack(PORTABLE.load(GGMLType.Q6_K, blocks))
    ids = mx.repeat(mx.arange(4, dtype=mx.uint32), 2)

    def run(x: Any) -> Any:
        for _ in range(4):
            x = chosen_transposed(frozen.stack, chosen_times(frozen.stack, x, ids), ids)
        return x

    assert peak_of(run, random_rows(8, 512)) < 4.8 * (4 * 4 * 1024 * 512)


def peak_of(function: Callable[[Any], Any], x: Any) -> int:
    mx.eval(function(x))  # so that all constants are there
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function(x))
    return mx.get_peak_memory() - before

"""AdamW against float64, 8-bit moments against brute force, schedules in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.finetune.loop import TrainSettings  # noqa: E402
from localds.finetune.loop.dynamic_map import BLOCK, dequantize, dynamic_map, quantize  # noqa: E402
from localds.finetune.loop.optimizer import SMALL, AdamW  # noqa: E402
from localds.finetune.loop.schedule import Schedule  # noqa: E402


def test_adamw_is_the_papers_algorithm_in_float64():
    settings = TrainSettings(weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6)
    draw = np.random.default_rng(0)
    leaves = {"a": (3, 5), "b": (4, 3), "m": (4,)}
    reference = {leaf: draw.standard_normal(shape) for leaf, shape in leaves.items()}
    params = {"x": {leaf: mx.array(value, mx.float32) for leaf, value in reference.items()}}
    first = {leaf: np.zeros(shape) for leaf, shape in leaves.items()}
    second = {leaf: np.zeros(shape) for leaf, shape in leaves.items()}
    optimizer = AdamW(settings)
    for step in range(1, 41):
        rate, scale = 0.01 * step / 40, 0.5
        gradients = {leaf: draw.standard_normal(shape) for leaf, shape in leaves.items()}
        optimizer.update(
            params,
            {"x": {leaf: mx.array(g, mx.float32) for leaf, g in gradients.items()}},
            scale,
            rate,
        )
        for leaf, gradient in gradients.items():
            g = scale * gradient
            decay = 0.1 if leaf != "m" else 0.0
            first[leaf] = 0.8 * first[leaf] + 0.2 * g
            second[leaf] = 0.95 * second[leaf] + 0.05 * g * g
            m = first[leaf] / (1 - 0.8**step)
            v = second[leaf] / (1 - 0.95**step)
            value = reference[leaf]
            reference[leaf] = value - rate * decay * value - rate * m / (np.sqrt(v) + 1e-6)
    for leaf in leaves:
        np.testing.assert_allclose(np.array(params["x"][leaf]), reference[leaf], atol=2e-6)


def test_the_first_step_has_the_length_of_the_learning_rate():
    params = {"x": {"a": mx.zeros(4)}}
    AdamW(TrainSettings()).update(
        params, {"x": {"a": mx.array([1e-3, -1.0, 5.0, -2e-4])}}, 1.0, 2e-4
    )
    expected = 2e-4 * np.array([-1, 1, -1, 1])
    np.testing.assert_allclose(np.array(params["x"]["a"]), expected, rtol=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_the_paper(signed):
    values = dynamic_map(signed)
    assert values.shape == (256,) and (np.diff(values) > 0).all()
    assert values[-1] == 1 and 0 in values
    positive = values[(values > 0) & (values < 1)]
    per_decade = [
        int(((positive > 10.0**-d) & (positive < 10.0 ** (1 - d))).sum()) for d in range(1, 8)
    ]
    most = 64 if signed else 128
    assert per_decade == [most >> d for d in range(7)]
    assert positive[-1] == pytest.approx(1 - 0.9 / most / 2)  # the middle of the last part
    assert (values < 0).sum() == (127 if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 257), (1024,), (2, 4, 64)])
def test_a_value_becomes_the_nearest_of_the_map(signed, shape):
    draw = np.random.default_rng(1)
    values = (draw.standard_normal(shape) * 10.0 ** draw.uniform(-5, 3, shape)).astype(np.float32)
    values = values if signed else np.abs(values)
    codes, largest = quantize(mx.array(values), signed)
    assert codes.dtype == mx.uint8 and codes.shape == (-(-values.size // BLOCK), BLOCK)
    flat = np.zeros(codes.size, np.float32)
    flat[: values.size] = values.ravel()
    blocks = flat.reshape(-1, BLOCK)
    np.testing.assert_array_equal(np.array(largest), np.abs(blocks).max(axis=1))
    shares = blocks / np.abs(blocks).max(axis=1, keepdims=True)
    table = dynamic_map(signed).astype(np.float64)
    reach = np.abs(shares[..., None] - table)
    chosen = np.take_along_axis(reach, np.array(codes).astype(int)[..., None], -1)[..., 0]
    if signed:
        np.testing.assert_allclose(chosen, reach.min(axis=-1), atol=1e-7)
    else:  # nothing above 0 becomes 0
        np.testing.assert_allclose(
            chosen, np.where(shares > 0, reach[..., 1:].min(-1), 0), atol=1e-7
        )
    back = np.array(dequantize(codes, largest, mx.array(values), signed))
    expected = table[np.array(codes)] * np.abs(blocks).max(axis=1, keepdims=True)
    np.testing.assert_allclose(back, expected.ravel()[: values.size].reshape(shape), rtol=1e-6)


def test_a_block_of_zeros_stays_zero():
    zeros = mx.zeros((2, BLOCK))
    for signed in (True, False):
        assert not np.array(dequantize(*quantize(zeros, signed), zeros, signed)).any()


def test_8_bits_take_a_quarter_and_small_tensors_stay_float32():
    params = {"x": {"a": mx.zeros((16, 4096)), "b": mx.zeros(SMALL - 1)}}
    optimizer = AdamW(TrainSettings(optimizer="adamw8bit"))
    optimizer.update(params, {"x": {leaf: p + 1 for leaf, p in params["x"].items()}}, 1.0, 1e-3)
    moments = optimizer.moments["x"]
    assert {part: (a.dtype, a.size) for part, a in moments["a"].items()} == {
        "m": (mx.uint8, 16 * 4096),
        "m_largest": (mx.float32, 256),
        "v": (mx.uint8, 16 * 4096),
        "v_largest": (mx.float32, 256),
    }
    assert {part: (a.dtype, a.size) for part, a in moments["b"].items()} == {
        "m": (mx.float32, SMALL - 1),
        "v": (mx.float32, SMALL - 1),
    }


def descend(kind: str, steps: int) -> list[float]:
    """Minimize a quadratic whose curvatures span 1 to 1000, with noise in the gradients."""
    draw = np.random.default_rng(2)
    curvature = mx.array(10.0 ** draw.uniform(0, 3, 8192), mx.float32)
    aim = mx.array(draw.standard_normal(8192), mx.float32)
    params = {"x": {"a": mx.zeros(8192)}}
    optimizer = AdamW(TrainSettings(optimizer=kind))
    losses = []
    for step in range(steps):
        apart = params["x"]["a"] - aim
        losses.append(float((curvature * apart * apart).mean()) / 2)
        noise = mx.array(draw.standard_normal(8192), mx.float32)
        rate = 0.05 * (1 - step / steps)
        optimizer.update(params, {"x": {"a": curvature * (apart + 0.01 * noise)}}, 1.0, rate)
    return losses


def test_8_bits_converge_as_float32_does():
    full, quantized = descend("adamw", 300), descend("adamw8bit", 300)
    assert full[-1] < 1e-3 * full[0]
    assert max(np.array(quantized) / full) < 1.25
    assert quantized[-1] < 1.1 * full[-1]


def test_a_small_gradient_beside_a_large_one_takes_no_leap():
    """Its second moment lies below the map's smallest value: as 0 it would divide by almost 0."""
    values = np.full(SMALL, 3e-4, np.float32)
    values[::BLOCK] = 1.0
    params = {"x": {"a": mx.zeros(SMALL)}}
    optimizer = AdamW(TrainSettings(optimizer="adamw8bit"))
    for step in range(30):
        before = params["x"]["a"]
        gradient = values if step % 10 == 0 else values * np.float32(0.01)
        optimizer.update(params, {"x": {"a": mx.array(gradient)}}, 1.0, 1e-3)
        assert float(mx.abs(params["x"]["a"] - before).max()) < 1.5e-3


def test_schedules_in_closed_form():
    for kind, middle, last in (
        ("cosine", 0.55, 0.1 + 0.9 * (1 + math.cos(math.pi * 89 / 90)) / 2),
        ("linear", 0.55, 0.1 + 0.9 / 90),
        ("constant", 1.0, 1.0),
    ):
        settings = TrainSettings(learning_rate=2.0, schedule=kind, warmup=0.1, floor=0.1)
        rates = [Schedule(settings, 100).rate(step) / 2 for step in range(100)]
        np.testing.assert_allclose(rates[:11], [(step + 1) / 11 for step in range(11)])
        np.testing.assert_allclose([rates[55], rates[99]], [middle, last])
        assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (1.0, 1), (0.03, 1), (1.0, 7), (0.0, 7)])
def test_every_schedule_reaches_the_full_rate_and_never_0(warmup, steps):
    schedule = Schedule(TrainSettings(learning_rate=1.0, warmup=warmup), steps)
    rates = [schedule.rate(step) for step in range(steps)]
    assert max(rates) == 1.0 and min(rates) > 0


def test_steps_come_from_epochs_unless_given():
    assert TrainSettings(epochs=2.5).total_steps(9) == 23
    assert TrainSettings(steps=4, epochs=2.5).total_steps(9) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("epochs", 0.0),
        ("epochs", math.nan),
        ("accumulation", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("schedule", "step"),
        ("warmup", 1.5),
        ("floor", -0.1),
        ("optimizer", "sgd"),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("weight_decay", -1.0),
        ("clip", 0.0),
        ("seed", -1),
        ("evaluate_every", 0),
        ("patience", 0),
        ("checkpoint_every", 0),
        ("checkpoint_minutes", 0.0),
        ("keep_checkpoints", 0),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value!r}; it must be "):
        TrainSettings(**{field: value})

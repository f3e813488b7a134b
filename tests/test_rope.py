"""YaRN against figures published for the models, and against the paper's formula term by term."""

import math

import numpy as np
import pytest

from localds.models.rope import Scaling, make_rope, softmax_scale

V2_LITE = Scaling("yarn", 40.0, 4096, 0.707)
V3 = Scaling("yarn", 40.0, 4096, 1.0)
K2 = Scaling("yarn", 32.0, 4096, 1.0)


@pytest.mark.parametrize(
    ("scaling", "expected"), [(V2_LITE, 0.114721), (V3, 0.135234), (K2, 0.130861)]
)
def test_softmax_scale_has_the_published_value(scaling: Scaling, expected: float) -> None:
    assert softmax_scale(192, scaling) == pytest.approx(expected, abs=1e-6)


def test_softmax_scale_without_yarn_is_the_inverse_root() -> None:
    assert softmax_scale(192, Scaling()) == pytest.approx(192**-0.5)
    assert softmax_scale(192, Scaling("linear", 4.0)) == pytest.approx(192**-0.5)


def test_plain_frequencies_are_powers_of_the_base() -> None:
    rope = make_rope(8, 10000.0, Scaling())
    np.testing.assert_allclose(rope.inverse_frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert rope.amplitude == 1.0


def test_linear_scaling_divides_every_frequency() -> None:
    plain = make_rope(64, 10000.0, Scaling()).inverse_frequencies
    scaled = make_rope(64, 10000.0, Scaling("linear", 4.0)).inverse_frequencies
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    # V2-Lite: 32 rotations over 4096 positions happen at pair 10.47, one at pair 22.51.
    plain = make_rope(64, 10000.0, Scaling()).inverse_frequencies.astype(np.float64)
    got = make_rope(64, 10000.0, V2_LITE).inverse_frequencies
    ramp = np.clip((np.arange(32) - 10) / (23 - 10), 0, 1)
    np.testing.assert_allclose(got, plain * (1 - ramp) + plain / 40 * ramp, rtol=1e-6)
    assert got[10] == pytest.approx(plain[10])
    assert got[23] == pytest.approx(plain[23] / 40)


def test_amplitude_is_one_with_a_log_multiplier_and_mscale_without() -> None:
    assert make_rope(64, 10000.0, V3).amplitude == 1.0
    bare = make_rope(64, 10000.0, Scaling("yarn", 40.0, 4096, 0.0))
    assert bare.amplitude == pytest.approx(1 + 0.1 * math.log(40))
    assert softmax_scale(192, Scaling("yarn", 40.0, 4096, 0.0)) == pytest.approx(192**-0.5)


def test_yarn_with_equal_betas_is_a_step() -> None:
    # Kimi-K2 ships beta_fast = beta_slow = 1.
    scaling = Scaling("yarn", 32.0, 4096, 1.0, beta_fast=1.0, beta_slow=1.0)
    plain = make_rope(64, 50000.0, Scaling()).inverse_frequencies
    got = make_rope(64, 50000.0, scaling).inverse_frequencies
    pair = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(50000))
    low, high = math.floor(pair), math.ceil(pair)
    np.testing.assert_allclose(got[: low + 1], plain[: low + 1], rtol=1e-6)
    np.testing.assert_allclose(got[high:], plain[high:] / 32, rtol=1e-6)

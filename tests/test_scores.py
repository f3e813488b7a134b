"""Figures of predictions, in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localds import scores
from localds.scores import Scores


def targets(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def logits(*rows: list[float]) -> np.ndarray:
    """Logits of these distributions, up to a constant."""
    with np.errstate(divide="ignore"):
        return (np.log(rows) + 3).astype(np.float32)


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    scored = scores.score_rows(np.full((40, 300), 7.5, np.float32), np.arange(40, dtype=np.int32))
    assert scores.perplexity(scored.nll) == pytest.approx((300, 0))


def test_likelihoods() -> None:
    scored = scores.score_rows(logits([0.5, 0.25, 0.25], [0.1, 0.8, 0.1]), targets(1, 1))
    np.testing.assert_allclose(scored.nll, [math.log(4), math.log(1.25)], rtol=1e-6)
    assert scored.kl is None
    # The geometric mean of 4 and 1.25.
    assert scores.perplexity(scored.nll).value == pytest.approx(math.sqrt(5))


def test_large_logits_do_not_overflow() -> None:
    scored = scores.score_rows(np.array([[3e4, -3e4, 0]], np.float32), targets(1))
    assert scored.nll.tolist() == [6e4]
    assert scores.perplexity(scored.nll).value == math.inf


def test_divergence_of_known_distributions() -> None:
    p = logits([0.5, 0.5], [0.25, 0.75], [0.9, 0.1])
    q = logits([0.25, 0.75], [0.25, 0.75], [0.1, 0.9])
    scored = scores.score_rows(q, targets(0, 0, 0), p)
    assert scored.kl is not None
    assert scored.reference_nll is not None
    assert scored.same_top is not None
    # Of two equal logits, the first counts as the best.
    assert scored.same_top.tolist() == [False, True, False]
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0, 0.8 * math.log(9)]
    np.testing.assert_allclose(scored.kl, expected, atol=1e-6)
    np.testing.assert_allclose(scored.reference_nll, -np.log([0.5, 0.25, 0.9]), rtol=1e-6)


def test_a_token_that_the_reference_rules_out_adds_nothing() -> None:
    scored = scores.score_rows(logits([0.5, 0.25, 0.25]), targets(0), logits([0.5, 0.5, 0]))
    assert scored.kl is not None
    np.testing.assert_allclose(scored.kl, [0.5 * math.log(2)], rtol=1e-6)


def test_error_of_a_mean() -> None:
    # Variance 1.25 around 2.5, over n - 1 = 3.
    assert scores.mean_estimate(np.array([1.0, 2, 3, 4])) == pytest.approx(
        (2.5, math.sqrt(1.25 / 3))
    )
    assert scores.mean_estimate(np.array([2.0])) == (2, math.inf)


def test_comparison() -> None:
    random = np.random.default_rng(0)
    base = random.gamma(2, 1, 101)
    ours = base + random.normal(0.01, 0.1, 101)
    same = np.arange(101) % 4 != 0  # 75 of 101
    found = scores.compare(Scores(ours, base, np.arange(101) / 1000, same))
    assert found.mean_kl.value == pytest.approx(0.05)
    assert found.kl_99 == pytest.approx(0.099)
    assert found.max_kl == pytest.approx(0.1)
    share = 75 / 101
    assert found.same_top == pytest.approx((share, math.sqrt(share * (1 - share) / 100)))
    assert found.log_perplexity_ratio.value == pytest.approx((ours - base).mean())

    # Errors of dependent figures, from variances and the covariance.
    e, b = math.exp(ours.mean()), math.exp(base.mean())
    cov = np.cov(ours, base, ddof=0) / 100
    assert found.reference_perplexity == pytest.approx((b, b * math.sqrt(cov[1, 1])))
    error = math.sqrt(e * e * cov[0, 0] + b * b * cov[1, 1] - 2 * e * b * cov[0, 1])
    assert found.perplexity_difference == pytest.approx((e - b, error))
    error = math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert found.log_perplexity_ratio.error == pytest.approx(error)


def test_comparison_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="without a reference"):
        scores.compare(Scores(np.ones(3)))


def test_join_keeps_the_order() -> None:
    q, p = logits([0.5, 0.5], [0.25, 0.75]), logits([0.25, 0.75], [0.5, 0.5])
    whole = scores.score_rows(q, targets(0, 1), p)
    parts = [scores.score_rows(q[i : i + 1], targets(i), p[i : i + 1]) for i in range(2)]
    for joined, expected in zip(scores.join(parts), whole, strict=True):
        assert joined is not None
        assert expected is not None
        assert joined.tolist() == expected.tolist()
    alone = scores.join([scores.score_rows(q, targets(0, 1))] * 2)
    assert len(alone.nll) == 4
    assert alone.kl is None

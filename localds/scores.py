"""Figures of how well tokens were predicted, and how far predictions lie from a reference's.

They are those of llama.cpp's perplexity program. Errors are standard errors of the mean, to first
order where a figure is no mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


class Scores(NamedTuple):
    """Figures of every scored token, in nats. Without a reference there is only `nll`.

    `nll` is the negative log-likelihood of the token, `kl` the divergence of the prediction from
    the reference's, `same_top` whether both think the same token likeliest.
    """

    nll: Doubles
    reference_nll: Doubles | None = None
    kl: Doubles | None = None
    same_top: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside a reference, on the same tokens. Divergences in nats."""

    reference_perplexity: Estimate
    perplexity_difference: Estimate
    log_perplexity_ratio: Estimate
    mean_kl: Estimate
    kl_99: float
    max_kl: float
    same_top: Estimate


def perplexity(nll: Doubles) -> Estimate:
    """Exp of the mean negative log-likelihood."""
    mean, error = mean_estimate(nll)
    with np.errstate(over="ignore"):
        value = float(np.exp(mean))
    return Estimate(value, value * error)


def compare(scores: Scores) -> Comparison:
    """The figures of scores beside a reference. Raises `ValueError` for scores without one."""
    nll, reference, kl, same_top = scores
    if reference is None or kl is None or same_top is None:
        raise ValueError("compare: the scores were made without a reference")
    ours, theirs = perplexity(nll), perplexity(reference)
    # Both are measured on the same tokens, so their errors go together for the most part.
    difference = mean_estimate(ours.value * nll - theirs.value * reference)
    return Comparison(
        reference_perplexity=theirs,
        perplexity_difference=Estimate(ours.value - theirs.value, difference.error),
        log_perplexity_ratio=mean_estimate(nll - reference),
        mean_kl=mean_estimate(kl),
        kl_99=float(np.quantile(kl, 0.99)),
        max_kl=float(kl.max()),
        same_top=mean_estimate(same_top.astype(np.float64)),
    )


def mean_estimate(values: Doubles) -> Estimate:
    """The mean of independent values; of a single one, the error is infinite."""
    n = len(values)
    return Estimate(
        float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > 1 else math.inf
    )


def score_rows(
    logits: Floats, targets: NDArray[np.int32], reference: Floats | None = None
) -> Scores:
    """Score `logits` [n, n_vocab] against the tokens `targets` [n] that came."""
    log_q = log_softmax(logits)
    at = np.arange(len(targets)), targets
    if reference is None:
        return Scores(-log_q[at])
    log_p = log_softmax(reference)
    # A token that the reference rules out (probability 0) adds nothing.
    terms = np.exp(log_p) * (np.where(np.isneginf(log_p), log_q, log_p) - log_q)
    return Scores(
        -log_q[at], -log_p[at], terms.sum(axis=1), log_q.argmax(axis=1) == log_p.argmax(axis=1)
    )


def log_softmax(logits: Floats) -> Doubles:
    """Log-probabilities float64 of the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def join(parts: Sequence[Scores]) -> Scores:
    """The scores of all parts, in order."""

    def column(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    if parts[0].kl is None:
        return Scores(column("nll"))
    return Scores(*map(column, Scores._fields))

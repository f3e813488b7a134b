"""Choosing the next token on the device that computed the logits.

What `Sampler` does on the host, by the same random numbers: the same id comes out unless a sum
rounds to the other side of a bound. The host sums in double, the device in float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

import mlx.core as mx

from localds.ops.mlx.computing import on_gpu
from localds.sampling import SMALLEST_TEMPERATURE

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.sampling import Sampler, SamplingParams

    Choose = Callable[[mx.array, mx.array], mx.array]

# The largest float32 below 1: a smaller random number times a sum stays below the sum.
BELOW_ONE = 1 - 2.0**-24

BLOCK = 256
"""Weights summed as one before it is decided in which block the token lies."""

EXPONENT = 0x7F800000
"""Bits of a float32 that are all set where it is infinite or not a number."""

LAST = 2**63 - 1
"""A key behind all others."""


class Rules(NamedTuple):
    """The fields of `SamplingParams` by which the device chooses."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def samples_on_device(params: SamplingParams) -> bool:
    """Whether `DeviceSampler` takes these: penalties and biases are the host's only."""
    return not params.penalizes and not params.logit_bias


class DeviceSampler:
    """Draws the tokens that `sampler` would, whose random numbers it uses up.

    Raises `ValueError` for parameters that `samples_on_device` refuses.
    """

    def __init__(self, sampler: Sampler) -> None:
        params = sampler.params
        if not samples_on_device(params):
            raise ValueError(
                "sampling on the device has no penalties and no logit_bias; sample on the host"
            )
        self._sampler = sampler
        self._rules = Rules(params.temperature, params.top_k, params.top_p, params.min_p)

    def __call__(self, logits: mx.array) -> mx.array:
        """Choose from `logits` float32 [n_vocab]; nothing is computed yet.

        Returns int32 [2]: the token's id, in the vocabulary in any case, and whether all logits
        are finite (1; else 0, and the id means nothing).
        """
        random = self._sampler.random() if self._rules.temperature > 0 else 0.0
        return _chooser(self._rules, on_gpu())(logits, mx.array(min(random, BELOW_ONE), mx.float32))


@lru_cache(maxsize=8)
def _chooser(rules: Rules, compiled: bool) -> Choose:
    """(logits, random number) -> what `DeviceSampler` returns, in one graph on a GPU."""

    def choose(logits: mx.array, random: mx.array) -> mx.array:
        if rules.temperature == 0:
            token = mx.argmax(logits)
        else:
            token = _draw(_weights(logits, rules), random)
        # By bits: no compiler's idea of fast arithmetic can drop this.
        finite = ((logits.view(mx.int32) & EXPONENT) != EXPONENT).all()
        return mx.stack([token, finite]).astype(mx.int32)

    return cast("Choose", mx.compile(choose)) if compiled else choose


def _weights(logits: mx.array, rules: Rules) -> mx.array:
    """What each token [n_vocab] is drawn in proportion to; 0 where a rule leaves it out."""
    most = logits.max()
    weights = mx.exp((logits - most) / max(rules.temperature, SMALLEST_TEMPERATURE))
    if 0 < rules.top_k < len(logits) or rules.top_p < 1:
        keys = _keys(logits)
        weights = mx.where(keys <= _last_key(logits, keys, rules), weights, 0)
    if rules.min_p > 0:
        weights = mx.where(logits >= most + math.log(rules.min_p), weights, 0)
    return weights


def _keys(logits: mx.array) -> mx.array:
    """Unique int64 that rise as logits fall, equal ones by id; the low half is the id."""
    # Of the two zeros, which are equal, only one.
    bits = mx.where(logits == 0, 0.0, logits).view(mx.int32)
    rising = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    falling = mx.bitwise_invert(rising).astype(mx.int64)
    return (falling << 32) | mx.arange(len(logits), dtype=mx.int64)


def _last_key(logits: mx.array, keys: mx.array, rules: Rules) -> mx.array:
    """The key of the least likely token that top-k, then top-p leave."""
    ranked = _smallest(keys, min(rules.top_k or len(keys), len(keys)))
    if rules.top_p == 1:
        return ranked[-1]
    scores = logits[ranked.astype(mx.uint32)]
    reached = mx.cumsum(mx.exp(scores - scores[0]))
    last = (reached < rules.top_p * reached[-1]).sum()
    return ranked[mx.minimum(last, len(ranked) - 1)]


def _smallest(keys: mx.array, count: int) -> mx.array:
    """The `count` smallest of the unique `keys`, rising."""
    if 4 * count < len(keys):
        # A GPU sorts everything also where few are wanted. They lie in the `count` blocks with the
        # smallest minima; at this width there are as many blocks as keys in those.
        width = math.isqrt(len(keys) // count)
        blocks = _blocks(keys, width, LAST)
        keys = blocks[mx.argsort(blocks.min(axis=1))[:count]].flatten()
    return mx.sort(keys)[:count]


def _draw(weights: mx.array, random: mx.array) -> mx.array:
    """Index drawn in proportion to `weights`, by `random` in [0, BELOW_ONE]."""
    # In two steps: a GPU runs along a row with one group of threads, and short sums round less.
    blocks = _blocks(weights, BLOCK, 0)
    sums = blocks.sum(axis=1)
    block, rest = _first_above(sums, random * sums.sum())
    inside, _ = _first_above(blocks[block], rest)
    return block * BLOCK + inside


def _first_above(weights: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array]:
    """Index of the first running sum above `wanted`, and what `wanted` is above the one before.

    Never that of a weight of 0: sums in parallel may differ in rounding where nothing was added.
    """
    running = mx.cumsum(weights)
    possible = mx.where(weights > 0, running, 0)
    wanted = mx.minimum(wanted, possible.max() * BELOW_ONE)
    index = mx.argmax(possible > wanted)
    return index, mx.maximum(wanted - (running[index] - weights[index]), 0)


def _blocks(values: mx.array, width: int, filler: int) -> mx.array:
    """`values` [n] as rows of `width`, the last one filled up."""
    missing = -len(values) % width
    if missing:
        values = mx.concatenate([values, mx.full((missing,), filler, values.dtype)])
    return values.reshape(-1, width)

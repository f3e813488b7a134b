"""Choosing the next token from logits, and noticing stop strings in the text.

The order of the steps is llama.cpp's, so that settings carry over: logit bias, penalties, top-k,
top-p, min-p, temperature. Temperature comes last: top-p and min-p look at the probabilities as
they are before it.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections import Counter
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from localds.matching import partial_suffix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

# A temperature below the smallest float32 must not become a division by zero.
SMALLEST_TEMPERATURE = 2.0**-126
_MAX = sys.float_info.max
_RULES: dict[str, tuple[type, Callable[[float], bool], str]] = {
    "temperature": (Real, lambda x: x >= 0, "a number of at least 0"),
    "top_k": (Integral, lambda x: x >= 0, "a whole number of at least 0 (0: off)"),
    "top_p": (Real, lambda x: 0 < x <= 1, "above 0 and at most 1 (1: off)"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "from 0 to 1 (0: off)"),
    "repetition_penalty": (Real, lambda x: x > 0, "a number above 0 (1: off)"),
    "presence_penalty": (Real, lambda _: True, "a finite number (0: off)"),
    "frequency_penalty": (Real, lambda _: True, "a finite number (0: off)"),
    "penalty_window": (Integral, lambda x: x >= -1, "a whole number of at least -1 (-1: all)"),
    "seed": (Integral, lambda x: x >= 0, "a whole number of at least 0, or None"),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults take the likeliest token and change nothing.

    `temperature`: 0 takes the likeliest token; otherwise logits are divided by it.
    `top_k`: only the k likeliest tokens; 0 is off.
    `top_p`: only the fewest tokens whose probabilities together reach it; 1 is off.
    `min_p`: only tokens with at least this fraction of the likeliest one's probability; 0 is off.
    `repetition_penalty`: positive logits of tokens seen before are divided by it, others
    multiplied; 1 is off. `presence_penalty` is subtracted once from the logit of a token seen
    before, `frequency_penalty` once for each time it was seen; 0 is off. All three look at the
    last `penalty_window` tokens, those of the prompt included (-1: at all of them).
    `seed`: of the random numbers; None takes a fresh one.
    `logit_bias`: added to the logits of the given ids; -inf bans a token.
    Raises `ValueError` naming the field and the value.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (kind, allowed, wording) in _RULES.items():
            value: Any = getattr(self, name)
            if name == "seed" and value is None:
                continue
            # Compared, not passed to isfinite, which overflows on huge integers.
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not number or not -_MAX <= value <= _MAX or not allowed(value):
                raise ValueError(f"sampling: {name} is {value!r}; it must be {wording}")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral) or token < 0:
                raise ValueError(f"sampling: logit_bias has the key {token!r}; keys are token ids")
            if not isinstance(bias, Real) or math.isnan(bias) or bias == math.inf:
                raise ValueError(
                    f"sampling: logit_bias of token {token} is {bias!r}; "
                    "it must be a number or -inf"
                )
        # A later change of the caller's dictionary must not change a frozen value.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is on."""
        on = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        return on and self.penalty_window != 0


class Sampler:
    """Draws tokens by `params`. The same seed and logits give the same tokens.

    `seed` is the one in use, also where `params` left it open.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """Return the next token's id.

        `logits` [n_vocab] are left as they are; `history` holds the tokens so far, oldest first.
        Of equal logits the lowest id counts as the likelier. Raises `ValueError` for logits that
        are not finite, a biased id outside the vocabulary, and a bias that bans every token.
        """
        check_finite(logits)
        scores = self._adjusted(logits, history)
        if self.params.temperature == 0:
            return int(scores.argmax())
        ids, chosen = _filtered(scores, self.params)
        temperature = np.float32(max(self.params.temperature, SMALLEST_TEMPERATURE))
        with np.errstate(over="ignore"):
            weights = np.exp((chosen - chosen.max()) / temperature)
        drawn = _draw(weights, self.random())
        return drawn if ids is None else int(ids[drawn])

    def random(self) -> float:
        """The next of the numbers in [0, 1) that tokens are drawn by, one a token.

        Greedy sampling (temperature 0) takes none.
        """
        return self._random.random()

    def _adjusted(self, logits: NDArray[np.float32], history: Sequence[int]) -> NDArray[np.float32]:
        """The logits after bias and penalties; a copy where anything changed."""
        params = self.params
        if not params.logit_bias and not params.penalizes:
            return logits
        scores = logits.copy()
        for token, bias in params.logit_bias.items():
            if token >= len(scores):
                raise ValueError(
                    f"sampling: logit_bias names token {token}; the vocabulary ends at "
                    f"{len(scores) - 1}"
                )
            scores[token] += bias
        if params.penalizes and len(history):
            self._penalize(scores, history)
        if scores.max() == -math.inf:
            raise ValueError("sampling: logit_bias bans every token")
        return scores

    def _penalize(self, scores: NDArray[np.float32], history: Sequence[int]) -> None:
        params = self.params
        window = params.penalty_window
        recent = history if window < 0 else history[-window:]
        seen = Counter(recent)
        ids = np.fromiter(seen.keys(), np.intp, len(seen))
        counts = np.fromiter(seen.values(), np.float32, len(seen))
        values = scores[ids]
        repetition = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / repetition, values * repetition)
        values -= counts * np.float32(params.frequency_penalty) + np.float32(
            params.presence_penalty
        )
        scores[ids] = values


def check_finite(logits: NDArray[np.float32]) -> None:
    """Raise `ValueError` unless all `logits` [n_vocab] are finite."""
    finite = np.isfinite(logits)
    if not finite.all():
        bad = int(finite.argmin())
        raise ValueError(
            f"sampling: the logit of token {bad} is {logits[bad]}; the model's computation "
            "overflowed, which points to a damaged file"
        )


def _filtered(
    scores: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
    """Ids (ascending) and scores that survive top-k, top-p and min-p; None stands for all ids."""
    ids = None
    if 0 < params.top_k < len(scores):
        bound = np.partition(scores, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(_leading(scores, bound, params.top_k))
        scores = scores[ids]
    if params.top_p == 1 and params.min_p == 0:
        return ids, scores
    likely = _nucleus(scores, params.top_p) if params.top_p < 1 else np.ones(len(scores), np.bool_)
    if params.min_p > 0:
        # Relative to the likeliest token, which the steps before always keep.
        likely &= scores >= scores.max() + np.float32(math.log(params.min_p))
    return np.flatnonzero(likely) if ids is None else ids[likely], scores[likely]


def _nucleus(scores: NDArray[np.float32], top_p: float) -> NDArray[np.bool_]:
    """Mask of the fewest scores whose probabilities together reach `top_p`."""
    weights = np.exp(scores - scores.max())
    total = float(weights.sum(dtype=np.float64))
    # What lies below this bound adds up to less than 1 - top_p, so the sort can leave it out. The
    # factor makes room for rounding.
    needed = weights >= 0.999 * (1 - top_p) * total / len(scores)
    ranked = np.sort(scores[needed])[::-1]
    reached = np.exp(ranked - ranked[0]).astype(np.float64).cumsum()
    last = min(int(reached.searchsorted(top_p * total)), len(ranked) - 1)
    return _leading(scores, ranked[last], last + 1)


def _leading(scores: NDArray[np.float32], bound: np.float32, count: int) -> NDArray[np.bool_]:
    """Mask of the `count` largest scores, `bound` being the least of them; equal ones by id."""
    mask = scores > bound
    mask[np.flatnonzero(scores == bound)[: count - np.count_nonzero(mask)]] = True
    return mask


def _draw(weights: NDArray[np.float32], random: float) -> int:
    """Index drawn in proportion to `weights`, by `random` in [0, 1)."""
    # In two steps, first a block: a running sum over the whole vocabulary takes over a millisecond.
    starts = np.arange(0, len(weights), 256)
    blocks = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    wanted = random * blocks[-1]
    block = _first_above(blocks, wanted)
    start = int(starts[block])
    inside = weights[start : start + 256].astype(np.float64).cumsum()
    return start + _first_above(inside, wanted - (blocks[block - 1] if block else 0.0))


def _first_above(sums: NDArray[np.float64], wanted: float) -> int:
    """Index of the first of the rising `sums` above `wanted`; rounding never leads past the end."""
    below_all = np.nextafter(sums[-1], 0)
    return int(sums.searchsorted(min(wanted, below_all), side="right"))


class StopMatcher:
    """Cuts streamed text at the first stop string.

    Text that may be the beginning of a stop string is held back until that is decided; the stop
    string itself never comes out. Which one counts is the one that is complete first, so the
    result does not depend on how the text was cut into pieces. Raises `ValueError` for an empty
    stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self._stop):
            raise ValueError("stop strings: an empty string would end every text; leave it out")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next piece; return what can be shown now. Nothing follows a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        held = partial_suffix(text, self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """End of text: return what was held back."""
        held, self._held = self._held, ""
        return held

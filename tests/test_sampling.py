"""Sampling: distributions against closed forms, filters against brute force, stop strings."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localds.sampling import Sampler, SamplingParams, StopMatcher, _draw

SOME = np.array([2.0, -1.0, 0.5, 3.0, 0.5, -4.0], np.float32)


def softmax(logits: Any) -> Any:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def expected(logits: Any, params: SamplingParams, history: list[int]) -> Any:
    """Probabilities by the definitions, one token at a time and in float64."""
    scores = [float(x) for x in logits]
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    window = params.penalty_window
    seen = Counter(history if window < 0 else history[len(history) - window :] if window else [])
    for token, count in seen.items():
        r = params.repetition_penalty
        scores[token] = scores[token] / r if scores[token] > 0 else scores[token] * r
        scores[token] -= params.presence_penalty + count * params.frequency_penalty
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.top_k:
        order = order[: params.top_k]
    p = dict(zip(order, softmax([scores[i] for i in order]), strict=True))
    reached = 0.0
    nucleus = []
    for token in order:
        nucleus.append(token)
        reached += p[token]
        if reached >= params.top_p:
            break
    kept = [i for i in nucleus if p[i] >= params.min_p * p[order[0]]]
    result = np.zeros(len(scores))
    result[kept] = softmax([scores[i] / params.temperature for i in kept])
    return result


def drawn(logits: Any, params: SamplingParams, history: list[int], times: int) -> Any:
    sampler = Sampler(params)
    return np.bincount(
        [sampler.sample(logits, history) for _ in range(times)], minlength=len(logits)
    )


def assert_distribution(counts: Any, probabilities: Any) -> None:
    """Chi-square: nothing impossible drawn, and a fit that chance misses once in a billion."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    wanted = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    freedom = possible.sum() - 1
    # Wilson-Hilferty: the cube root of chi-square per degree of freedom is nearly normal.
    if freedom == 0:
        return
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 6


@pytest.mark.parametrize(
    ("settings_", "history"),
    [
        ({}, []),
        ({"temperature": 0.5}, []),
        ({"temperature": 3.0}, []),
        ({"top_k": 1}, []),
        ({"top_k": 3}, []),
        ({"top_k": 100}, []),
        ({"top_p": 0.9}, []),
        ({"top_p": 1e-9}, []),
        ({"min_p": 0.2}, []),
        ({"min_p": 1.0}, []),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7}, []),
        ({"repetition_penalty": 1.5}, [0, 1, 1, 5]),
        ({"presence_penalty": 0.7}, [0, 0, 3]),
        ({"frequency_penalty": 0.4}, [0, 0, 3]),
        ({"frequency_penalty": -0.4, "penalty_window": 2}, [3, 3, 3, 0, 1]),
        ({"presence_penalty": 1.0, "penalty_window": 0}, [0, 3]),
        ({"presence_penalty": 1.0, "penalty_window": -1}, [0, *[1] * 100]),
        ({"logit_bias": {3: -math.inf, 5: 6.0}}, []),
    ],
)
def test_tokens_are_drawn_with_the_defined_probabilities(
    settings_: dict[str, Any], history: list[int]
) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": 7, **settings_})
    counts = drawn(SOME, params, history, 4_000)
    assert_distribution(counts, expected(SOME, params, history))


def test_a_large_vocabulary_is_drawn_from_as_a_small_one() -> None:
    # The draw goes by blocks of 256: the mass lies around the borders of some.
    logits = np.full(5000, -20.0, np.float32)
    logits[[0, 255, 256, 511, 513, 4863, 4864, 4999]] = [1, 2, 0, 1, 3, 2, 1, 2]
    params = SamplingParams(temperature=1.0, seed=1)
    probabilities = expected(logits, params, [])
    counts = drawn(logits, params, [], 4_000)
    rare = probabilities < 1e-6
    assert counts[rare].sum() <= 2
    counts[rare] = 0
    probabilities[rare] = 0
    assert_distribution(counts, probabilities / probabilities.sum())


def test_the_ends_of_the_random_numbers_draw_tokens_that_are_possible() -> None:
    for size in (5, 1000):
        weights = np.zeros(size, np.float32)
        weights[[2, size - 3]] = 0.1
        assert _draw(weights, 0.0) == 2
        assert _draw(weights, np.nextafter(1.0, 0.0)) == size - 3


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_filters_keep_what_brute_force_keeps(data: st.DataObject) -> None:
    # Few distinct values, so that ties are the rule.
    values = st.integers(-3, 3).map(float)
    logits = np.array(data.draw(st.lists(values, min_size=1, max_size=40)), np.float32)
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.3, 1.0, 5.0])),
        top_k=data.draw(st.integers(0, 45)),
        top_p=data.draw(st.sampled_from([0.05, 0.31, 0.77, 0.97, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.01, 0.3, 0.99])),
        seed=data.draw(st.integers(0, 2**32)),
    )
    sampler = Sampler(params)
    probabilities = expected(logits, params, [])
    seen = {sampler.sample(logits) for _ in range(30)}
    assert all(probabilities[token] > 0 for token in seen)


def test_greedy_takes_the_largest_and_of_equal_ones_the_lowest_id() -> None:
    sampler = Sampler(SamplingParams())
    assert sampler.sample(SOME) == 3
    assert sampler.sample(np.array([1, 5, 5, 2], np.float32)) == 1


def test_greedy_obeys_bias_and_penalties() -> None:
    assert Sampler(SamplingParams(logit_bias={3: -math.inf})).sample(SOME) == 0
    assert Sampler(SamplingParams(presence_penalty=2.0)).sample(SOME, [3]) == 0


def test_the_smallest_temperature_is_greedy() -> None:
    sampler = Sampler(SamplingParams(temperature=1e-300, seed=1))
    assert {sampler.sample(SOME) for _ in range(50)} == {3}


def test_top_k_keeps_the_lowest_ids_of_equal_logits() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=3, seed=3))
    assert {sampler.sample(np.zeros(1000, np.float32)) for _ in range(200)} == {0, 1, 2}


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal((100, 300)).astype(np.float32)
    runs = []
    for seed in (5, 5, 6):
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.95, seed=seed))
        runs.append([sampler.sample(row) for row in logits])
    assert runs[0] == runs[1] != runs[2]


def test_an_open_seed_is_fresh_and_can_be_used_again() -> None:
    first, second = (Sampler(SamplingParams(temperature=1.0)) for _ in range(2))
    assert first.seed != second.seed
    tokens = [first.sample(SOME) for _ in range(50)]
    again = Sampler(SamplingParams(temperature=1.0, seed=first.seed))
    assert [again.sample(SOME) for _ in range(50)] == tokens


def test_logits_are_left_as_they_are() -> None:
    logits = SOME.copy()
    params = SamplingParams(
        temperature=1.0, repetition_penalty=2.0, logit_bias={0: 1.0}, top_k=2, top_p=0.5
    )
    Sampler(params).sample(logits, [0, 1])
    np.testing.assert_array_equal(logits, SOME)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = SOME.copy()
    logits[4] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"token 4 is -?(nan|inf)"):
            Sampler(SamplingParams(temperature=temperature)).sample(logits)


def test_a_bias_beyond_the_vocabulary_or_on_every_token_is_refused() -> None:
    with pytest.raises(ValueError, match="token 6; the vocabulary ends at 5"):
        Sampler(SamplingParams(logit_bias={6: 1.0})).sample(SOME)
    with pytest.raises(ValueError, match="bans every token"):
        Sampler(SamplingParams(logit_bias=dict.fromkeys(range(6), -math.inf))).sample(SOME)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", "1"),
        ("penalty_window", -2),
        ("seed", -1),
        ("seed", 0.5),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"a": 0.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: "x"}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_parameters_do_not_follow_a_dictionary_that_changes() -> None:
    bias = {3: -math.inf}
    params = SamplingParams(logit_bias=bias)
    bias.clear()
    assert Sampler(params).sample(SOME) == 0


# Stop strings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: everything before the stop string that is complete first."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_cut_whatever_the_pieces(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = [matcher.push(piece) for piece in pieces]
    wanted, stopped = cut("".join(pieces), stops)
    assert ("".join(shown) + matcher.flush(), matcher.stopped) == (wanted, stopped)
    # What was shown at any time belongs to the result.
    assert all(wanted.startswith("".join(shown[:i])) for i in range(len(shown) + 1))


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert [matcher.push(x) for x in ("Hi", "\n", "Us", "ed", "\nUser", ": more")] == [
        *("Hi", "", "", "\nUsed", "", "")
    ]
    assert matcher.stopped
    assert matcher.push("after") == matcher.flush() == ""


def test_an_unfinished_stop_string_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == "the "
    assert matcher.flush() == "EN"
    assert not matcher.stopped


def test_an_empty_stop_string_is_refused_and_a_single_one_is_one() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["x", ""])
    assert StopMatcher("ab").push("xaby") == "x"

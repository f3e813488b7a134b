"""The simulator's policies, on sequences short enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
from expert_simulator import Call, Engine, Lfu, Lru, Optimum, Policy, replay


def tokens(*experts: int) -> list[Call]:
    """Tokens that each need one expert of a single layer."""
    return [Call(0, 1, ((expert, 1),)) for expert in experts]


def hits(policy: Policy, sequence: list[Call]) -> int:
    replay(policy, sequence)
    assert policy.uses == sum(len(call.uses) for call in sequence)
    return policy.hits


def test_by_hand() -> None:
    sequence = tokens(1, 1, 2, 3, 1, 2)
    # LRU holds 1 | 1 | 1 2 | 2 3 | 3 1 | 1 2, LFU keeps 1, which was used twice.
    assert hits(Lru(2), sequence) == 1
    assert hits(Lfu(2), sequence) == 2
    # The optimum never takes 3 in.
    assert hits(Optimum(2, sequence), sequence) == 3


def test_a_scan_over_more_than_fits() -> None:
    """LRU loses everything before it comes again, the optimum keeps all that fits."""
    sequence = tokens(*[0, 1, 2, 3, 4] * 4)
    assert hits(Lru(4), sequence) == 0
    assert hits(Optimum(4, sequence), sequence) >= 3 * 3
    assert hits(Engine(3, 1), sequence) == 3 * 3


def test_engine_keeps_what_is_used_most_through_a_prompt() -> None:
    """A prompt that needs every expert once leaves the main part as it was."""
    favourites = tokens(*[0, 1, 2] * 5)
    prompt = [Call(0, 8, tuple((expert, 1) for expert in range(8)))]
    engine, lru = Engine(3, 1), Lru(4)
    for policy in (engine, lru):
        replay(policy, favourites + prompt)
    before = engine.hits, lru.hits
    for policy in (engine, lru):
        replay(policy, tokens(0, 1, 2))
    assert (engine.hits - before[0], lru.hits - before[1]) == (3, 0)


def test_engine_forgets() -> None:
    """What was popular long ago gives way to what is popular now."""
    engine = Engine(1, 1)
    replay(engine, tokens(*[0] * 3000))
    replay(engine, tokens(*[1, 2] * 3000))
    assert engine.hits > 3000 + 2500


@pytest.mark.parametrize("seed", range(5))
def test_optimum_is_never_beaten(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequence = [
        Call(layer, 2, tuple((int(e), 1) for e in np.sort(rng.choice(12, 3, replace=False))))
        for _ in range(60)
        for layer in range(3)
    ]
    best = hits(Optimum(14, sequence), sequence)
    for policy in (Lru(14), Lfu(14), Engine(11, 3)):
        assert hits(policy, sequence) <= best


@pytest.mark.parametrize("seed", range(3))
def test_engine_beats_lru_where_some_are_used_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [1 / (1 + rng.permutation(64)) for _ in range(4)]
    sequence = [
        Call(
            layer,
            1,
            tuple(
                (int(e), 1)
                for e in np.sort(rng.choice(64, 6, False, weights[layer] / weights[layer].sum()))
            ),
        )
        for _ in range(400)
        for layer in range(4)
    ]
    slots = 64
    engine, lru, lfu = Engine.of(slots, 6), Lru(slots), Lfu(slots)
    rates = [replay(policy, sequence) for policy in (engine, lru, lfu, Optimum(slots, sequence))]
    assert rates[0] > 1.1 * rates[1]
    assert rates[0] > 0.95 * rates[2]
    assert rates[0] < rates[3]

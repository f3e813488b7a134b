"""Examples in rows and rows in batches: every token once, none across a border, always the same."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localds.finetune.data import Batch, Batches, Encoded, Examples, Stage
from localds.finetune.data import packing as packing_module
from localds.finetune.data.examples import ExamplesBuilder
from localds.finetune.data.mixing import mix, shuffled
from localds.finetune.data.packing import group, pack

if TYPE_CHECKING:
    from collections.abc import Iterable


def examples_of(sizes: Iterable[int], untrained: float = 0.3) -> Examples:
    """Examples whose tokens are all different, of `sizes` tokens."""
    rng = np.random.default_rng(1)
    builder, start = ExamplesBuilder(), 0
    for size in sizes:
        trained = rng.random(size) >= untrained
        trained[0] = False
        builder.add(Encoded(np.arange(start, start + size, dtype=np.int32), trained))
        start += size
    return builder.build()


def predictions(batches: Iterable[Batch]) -> Counter[tuple[int, int]]:
    """The pairs (token, next token) that count."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        counts = batch.weights > 0
        found.update(zip(batch.ids[counts].tolist(), batch.targets[counts].tolist(), strict=True))
    return found


def wanted(examples: Examples) -> Counter[tuple[int, int]]:
    return Counter(
        (int(example.ids[i - 1]), int(example.ids[i]))
        for example in examples
        for i in np.flatnonzero(example.trained)
    )


def check_layout(batch: Batch, examples: Examples) -> None:
    """What `Batch` promises, row by row and segment by segment."""
    whole = {int(example.ids[0]): example for example in examples}
    assert batch.ids.dtype == batch.targets.dtype == np.int32
    assert batch.segments.dtype == batch.positions.dtype == np.int32
    assert batch.weights.dtype == np.float32
    for ids, targets, weights, segments, positions in zip(
        batch.ids, batch.targets, batch.weights, batch.segments, batch.positions, strict=True
    ):
        padding = segments == 0
        assert not (weights[padding].any() or ids[padding].any() or positions[padding].any())
        assert not padding[: np.count_nonzero(segments)].any(), "padding is at the end"
        assert sorted(set(segments[~padding])) == list(range(1, segments.max() + 1))
        for number in range(1, segments.max() + 1):
            there = np.flatnonzero(segments == number)
            assert there.tolist() == list(range(there[0], there[-1] + 1))
            example = whole[int(ids[there[0]])]
            assert ids[there].tolist() == example.ids[:-1].tolist()
            assert positions[there].tolist() == list(range(len(example) - 1))
            assert (weights[there] == example.trained[1:]).all()
            counts = weights[there] > 0
            assert targets[there][counts].tolist() == example.ids[1:][counts].tolist()


sizes_strategy = st.lists(st.integers(2, 65), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes_strategy,
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**70),
    packing=st.booleans(),
    window=st.integers(1, 50),
)
def test_every_trained_token_once_per_epoch(
    sizes: list[int], rows: int, seed: int, packing: bool, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "WINDOW", window)
        examples = examples_of(sizes)
        one = Batches(examples, [Stage(64, rows)], seed=seed, packing=packing)
        two = Batches(examples, [Stage(64, rows)], seed=seed, packing=packing, epochs=2)
        assert predictions(one) == wanted(examples)
        assert predictions(two) == Counter(dict.fromkeys(wanted(examples), 2))
        for batch in one:
            check_layout(batch, examples)
            assert len(batch.ids) <= rows
            assert batch.ids.shape[1] <= 64


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_strategy, seed=st.integers(0, 99), data=st.data())
def test_any_step_can_be_made_at_once(sizes: list[int], seed: int, data: st.DataObject) -> None:
    examples = examples_of(sizes)
    stages = [Stage(64, 2), Stage(128, 1)]
    run = Batches(examples, stages, seed=seed, epochs=3)
    steps = list(run)
    step = data.draw(st.integers(0, len(steps) - 1))
    fresh = Batches(examples, stages, seed=seed, epochs=3)[step]
    for name in ("ids", "targets", "weights", "segments", "positions"):
        assert np.array_equal(getattr(fresh, name), getattr(steps[step], name))
    # Going back works, too, and beyond the end the run goes on.
    assert np.array_equal(run[0].ids, steps[0].ids)
    assert np.array_equal(
        run[len(run) + 3].ids, Batches(examples, stages, seed=seed, epochs=3)[len(run) + 3].ids
    )


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 100), max_size=300), key=st.integers(0, 99))
def test_packing_leaves_no_two_rows_that_would_fit_in_one(sizes: list[int], key: int) -> None:
    rows = pack(np.array(sizes, np.int64), 100, key)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in row) for row in rows]
    assert all(total <= 100 for total in totals)
    # No two rows would go into one.
    assert len(totals) < 2 or sum(sorted(totals)[:2]) > 100


def test_rows_are_full() -> None:
    sizes = np.random.default_rng(0).integers(10, 300, 20_000)
    rows = pack(sizes, 2048, 5)
    assert sizes.sum() / (len(rows) * 2048) > 0.99


def test_short_examples_of_two_kinds_share_rows() -> None:
    """Each kind has a length of its own; a step should see both."""
    sizes = np.array([20] * 150 + [30] * 150)
    rows = pack(sizes, 128, 3)
    both = [row for row in rows if len(set(sizes[row].tolist())) == 2]
    assert len(both) > 0.5 * len(rows)


def test_epochs_and_seeds_differ() -> None:
    examples = examples_of([20] * 200)
    run = Batches(examples, [Stage(64)], seed=1, epochs=2)
    half = len(run) // 2
    firsts = [[int(run[step].ids[0, 0]) for step in range(at, at + half)] for at in (0, half)]
    other = Batches(examples, [Stage(64)], seed=2)
    assert firsts[0] != firsts[1]
    assert firsts[0] != [int(batch.ids[0, 0]) for batch in other]
    assert (run.epoch_at(0), run.epoch_at(half)) == (0, 1)
    assert run.epoch_at(half // 2) == pytest.approx(0.5, abs=0.02)


def test_the_order_is_the_same_everywhere() -> None:
    """Known answers: a run that goes on with another numpy must see the same."""
    # splitmix64 from 0 begins with this number; see Steele et al., 2014.
    assert int(mix(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF
    assert shuffled(8, 3, 1).tolist() == shuffled(8, 3, 1).tolist() != shuffled(8, 1, 3).tolist()


def test_shuffling_is_fair() -> None:
    first = Counter(int(shuffled(10, seed)[0]) for seed in range(5000))
    # 500 each; the deviation of a count is 21.
    assert all(abs(count - 500) < 110 for count in first.values())
    assert len(first) == 10


def test_batches_without_packing_are_as_wide_as_needed() -> None:
    examples = examples_of([5, 66, 65, 300, 129])
    batches = list(Batches(examples, [Stage(320, 1)], packing=False))
    assert sorted(batch.ids.shape for batch in batches) == [
        (1, 64),
        (1, 64),
        (1, 128),
        (1, 128),
        (1, 320),
    ]
    assert all(batch.segments.max() == 1 for batch in batches)
    assert [batch.ids.shape for batch in Batches(examples, [Stage(300)], packing=False)].count(
        (1, 300)
    ) == 1


def test_similar_lengths_share_a_batch_without_packing() -> None:
    sizes = np.array([10, 100, 11, 101, 12, 102])
    batches = group(sizes, 128, 3, 7)
    together = sorted(sorted(i for row in batch for i in row) for batch in batches)
    assert together == [[0, 2, 4], [1, 3, 5]]


def test_a_small_data_set_is_not_padded_to_the_full_length() -> None:
    [batch] = Batches(examples_of([30, 40, 50]), [Stage(4096, 2)])
    assert batch.ids.shape == (1, 128)
    assert (batch.tokens, batch.segments.max()) == (117, 3)


def test_a_curriculum() -> None:
    examples = examples_of([20] * 300 + [100] * 40 + [500] * 6)
    run = Batches(examples, [Stage(64, 8), Stage(128, 4), Stage(512)], epochs=3)
    stages = [run.stage_at(step) for step in range(len(run))]
    assert stages == sorted(stages)
    assert max(Counter(stages).values()) - min(Counter(stages).values()) <= 1
    assert [run.start_of(stage) for stage in range(3)] == [stages.index(s) for s in range(3)]
    longest = [0, 0, 0]
    for step in range(len(run)):
        batch = run[step]
        assert batch.ids.shape[1] <= (64, 128, 512)[stages[step]]
        longest[stages[step]] = max(longest[stages[step]], int(batch.positions.max()) + 1)
    assert longest == [19, 99, 499]
    # About as many tokens as three passes; the stages do not see the same examples.
    seen = sum(batch.tokens for batch in run)
    assert 2 < seen / (examples.tokens - len(examples)) < 4


def test_a_run_of_some_steps() -> None:
    examples = examples_of([20] * 30)
    assert len(Batches(examples, [Stage(64)], steps=77)) == 77
    assert len(list(Batches(examples, [Stage(64)], steps=7))) == 7
    assert len(Batches(examples, [Stage(64)])) == 10
    assert len(Batches(examples, [Stage(64)], epochs=2.5)) == 25
    assert len(Batches(examples, [Stage(64)], epochs=0.01)) == 1
    with pytest.raises(IndexError, match="from 0"):
        Batches(examples, [Stage(64)])[-1]


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([], {}, "at least one example"),
        ([Stage(10)], {}, "needs 19 positions"),
        ([Stage(10), Stage(64)], {}, "no example fits into rows of 10"),
        ([Stage(64), Stage(32)], {}, "must not fall"),
        ([Stage(64)], {"epochs": 0}, "above 0"),
        ([Stage(64)], {"steps": 0}, "above 0"),
    ],
)
def test_what_cannot_be(stages: list[Stage], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(examples_of([20] * 5), stages, **options)
    with pytest.raises(ValueError, match="above 0"):
        Stage(0)
    with pytest.raises(ValueError, match="needs 101 positions"):
        pack(np.array([101]), 100)

"""Tokens on MLX: the device's choice against the host's, and steps ahead against one by one."""

from __future__ import annotations

import threading
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import localds
from localds.catalog.resolve import DEMO
from localds.memory.latents import ContextError, LatentCache
from localds.models.decoder import Decoder, Interrupted
from localds.sampling import Sampler, SamplingParams
from localds.session import Session

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]'")

from localds.ops.mlx.cache import DeviceCache  # noqa: E402
from localds.ops.mlx.sampling import (  # noqa: E402
    BELOW_ONE,
    DeviceSampler,
    _chooser,
    _draw,
    _first_above,
    _keys,
    _smallest,
    samples_on_device,
)
from localds.ops.mlx.stream import _Run, pipelined  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from localds.model import Model

NEAR = 1e-5
"""As near to a border as rounding in float32 may matter."""

RULES = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0, "top_k": 7},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.93},  # of 40 equal ones, no whole number
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.98},
    {"min_p": 0.05},
    {"top_k": 300, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
    {"top_k": 10**6, "min_p": 1.0},
]


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def logits_of(kind: str, seed: int) -> Any:
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 1000))
    spread = {"flat": 0.5, "peaked": 4.0, "steep": 12.0, "ties": 0}[kind]
    if kind == "ties":
        # Among the values are both zeros.
        return np.float32([-2.0, -1.0, -0.0, 0.0, 1.0, 1.5])[random.integers(0, 6, n)]
    return (random.standard_normal(n) * spread).astype(np.float32)


def shares(logits: Any, params: SamplingParams) -> tuple[Any, float]:
    """Probability of each id, by the definitions and in float64; how near top-p was to a border."""
    scores = logits.astype(np.float64)
    order = np.lexsort((np.arange(len(scores)), -scores))
    if params.top_k:
        order = order[: params.top_k]
    p = np.exp(scores[order] - scores[order[0]])
    p /= p.sum()
    distance = 1.0
    if params.top_p < 1:
        reached = p.cumsum()
        distance = float(np.abs(reached - params.top_p).min())
        order = order[: int((reached < params.top_p).sum()) + 1]
        p = p[: len(order)]
    order = order[p >= params.min_p * p[0] * (1 - 1e-12)]
    result = np.zeros(len(scores))
    weights = np.exp((scores[order] - scores[order[0]]) / params.temperature)
    result[order] = weights / weights.sum()
    return result, distance


def on_device(logits: Any, params: SamplingParams) -> int:
    token, finite = DeviceSampler(Sampler(params))(mx.array(logits)).tolist()
    assert finite == 1
    return int(token)


# ---- the device's sampler ----


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_device_chooses_what_the_host_chooses(rules: dict[str, Any]) -> None:
    near = total = 0
    for kind in ("flat", "peaked", "steep", "ties"):
        for seed in range(25):
            logits = logits_of(kind, seed)
            params = SamplingParams(**{"temperature": 1.0, "seed": seed, **rules})
            token = on_device(logits, params)
            probability, distance = shares(logits, params)
            total += 1
            if distance < NEAR:
                near += 1
                continue
            above = probability.cumsum()
            random = Sampler(params).random()
            assert probability[token] > 0
            assert above[token] - probability[token] - NEAR <= random <= above[token] + NEAR
            if np.abs(above - random).min() < NEAR:
                near += 1
            else:
                assert token == Sampler(params).sample(logits), (kind, seed)
    assert near <= total / 20


def test_a_vocabulary_of_100000_tokens_is_drawn_from() -> None:
    logits = np.random.default_rng(3).standard_normal(102_400).astype(np.float32) * 3
    for rules in ({}, {"top_k": 40, "top_p": 0.95}, {"top_p": 0.7}):
        for seed in range(6):
            params = SamplingParams(temperature=0.8, seed=seed, **rules)
            token = on_device(logits, params)
            probability, _ = shares(logits, params)
            above = probability.cumsum()
            assert probability[token] > 0
            assert abs(above[token] - Sampler(params).random()) <= probability[token] + 5e-6


def test_a_seed_gives_the_numbers_that_the_host_draws_by() -> None:
    logits = logits_of("peaked", 1)
    params = SamplingParams(temperature=1.0, seed=5)
    host, device = Sampler(params), DeviceSampler(Sampler(params))
    ids = [host.sample(logits) for _ in range(40)]
    _chooser.cache_clear()
    assert [device(mx.array(logits)).tolist()[0] for _ in range(40)] == ids
    assert _chooser.cache_info().misses == 1  # else a GPU would compile for every token
    assert len(set(ids)) > 5


def test_greedy_takes_the_largest_and_of_equal_ones_the_lowest_id() -> None:
    logits = np.array([-3.0, 2.0, 7.5, 1.0, 7.5], np.float32)
    assert on_device(logits, SamplingParams()) == 2
    for kind in ("flat", "ties"):
        for seed in range(20):
            logits = logits_of(kind, seed)
            assert on_device(logits, SamplingParams()) == logits.argmax()


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = logits_of("peaked", 8)
    assert on_device(logits, SamplingParams(temperature=1e-300, seed=1)) == logits.argmax()


def test_the_ends_of_the_random_numbers_draw_tokens_that_are_possible() -> None:
    for size in (5, 1000):
        weights = np.zeros(size, np.float32)
        weights[[2, size - 3]] = 0.1
        assert _draw(mx.array(weights), mx.array(0.0)).item() == 2
        assert _draw(mx.array(weights), mx.array(BELOW_ONE)).item() == size - 3


def test_no_running_sum_above_what_is_wanted_still_draws_a_possible_token() -> None:
    index, _ = _first_above(mx.array([0.0, 3.0, 1.0, 0.0]), mx.array(4.0))
    assert index.item() == 2


def test_top_p_ends_where_the_sum_is_reached() -> None:
    # Four equal ones: the sums are exact, and two of them reach a half.
    logits = np.zeros(4, np.float32)
    seen = {on_device(logits, SamplingParams(temperature=1, top_p=0.5, seed=i)) for i in range(40)}
    assert seen == {0, 1}


def test_keys_rank_by_logit_and_equal_ones_by_id() -> None:
    logits = np.float32([0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45, 0.0, 3e38, -1.0, 2.0])
    ranked = np.argsort(np.array(_keys(mx.array(logits))))
    assert ranked.tolist() == np.lexsort((np.arange(len(logits)), -logits)).tolist()


@pytest.mark.parametrize("size", [1, 7, 300, 1000])
def test_the_smallest_are_found_without_sorting_all(size: int) -> None:
    keys = np.random.default_rng(size).permutation(size * 3)[:size].astype(np.int64) - size
    for count in sorted({1, 2, min(40, size), size // 4 + 1, size}):
        if count <= size:
            assert _smallest(mx.array(keys), count).tolist() == np.sort(keys)[:count].tolist()
    rising = np.arange(size)
    assert _smallest(mx.array(rising), min(5, size)).tolist() == rising[:5].tolist()


@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0}, RULES[9]], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_told(rules: dict[str, Any], value: float) -> None:
    logits = logits_of("flat", 4)
    logits[17] = value
    sampler = DeviceSampler(Sampler(SamplingParams(**rules, seed=1)))
    token, finite = sampler(mx.array(logits)).tolist()
    assert finite == 0
    assert 0 <= token < len(logits)


def test_penalties_and_biases_are_the_hosts() -> None:
    assert samples_on_device(SamplingParams(temperature=1.0, top_k=3, repetition_penalty=1.0))
    assert samples_on_device(SamplingParams(presence_penalty=1.0, penalty_window=0))
    for refused in (SamplingParams(frequency_penalty=0.1), SamplingParams(logit_bias={3: 1.0})):
        assert not samples_on_device(refused)
        with pytest.raises(ValueError, match="no penalties and no logit_bias; sample on the host"):
            DeviceSampler(Sampler(refused))


# ---- a step ahead ----

VOCABULARY = 50
TABLE = (np.random.default_rng(0).standard_normal((97, VOCABULARY)) * 2).astype(np.float32)
PROMPT = [4, 8, 15]


class Counting(Decoder[Any]):
    """Logits that depend on every token in the cache and its place, in rows of one float."""

    def forward(self, ids: Any, cache: LatentCache, **options: Any) -> Any:
        interrupt = options.get("interrupt")
        if interrupt is not None and interrupt.is_set():
            raise Interrupted
        cache.reserve(len(ids))
        rows = cache.layers[0].data.view(np.float32)[:, 0]
        rows[cache.length : cache.length + len(ids)] = ids
        cache.extend(len(ids))
        used = rows[: cache.length]
        return TABLE[[int(used @ np.arange(1, len(used) + 1)) % len(TABLE)]]


class Ahead:
    """The same on MLX, by `pipelined`."""

    def __init__(self, capacity: int) -> None:
        self.stream = mx.new_thread_unsafe_stream(mx.cpu)
        self.cache = DeviceCache(1, 1, capacity, "f32", self.stream)
        self.streams_of_steps: list[Any] = []
        self.good_steps = 10**9

    def step(self, ids: Any, cache: DeviceCache) -> Any:
        self.streams_of_steps.append(mx.default_stream(mx.cpu))
        cache.reserve(1)
        cache.upload()
        rows = cache.device[0].write(ids.reshape(1, 1).astype(mx.float32), cache.length)
        total = (rows[:, 0] * (mx.arange(len(rows)) + 1)).sum().astype(mx.int32)
        logits = mx.array(TABLE)[total % len(TABLE)][None]
        return logits if len(self.streams_of_steps) <= self.good_steps else logits * mx.inf

    def prefill(self) -> Any:
        """The prompt, without choosing; returns its last logits."""
        with mx.stream(self.stream):
            for token in PROMPT:
                logits = np.array(self.step(mx.array([token]), self.cache))
                self.cache.extend_computed(1)
        self.streams_of_steps.clear()
        return logits[0]


Pair = tuple["Generator[int, None, None]", LatentCache, list[int]]


def both(capacity: int, interrupt: Any = None, **rules: Any) -> tuple[Pair, Pair, Ahead]:
    """One by one and ahead, each with its cache and history, after the prompt."""
    params = SamplingParams(**{"temperature": 1.0, "seed": 3, **rules})
    decoder = Counting(None, None, (), None)  # type: ignore[arg-type]
    cache = LatentCache(1, 1, capacity, "f32")
    logits = decoder.forward(np.array(PROMPT, np.int32), cache)[0]
    ahead = Ahead(capacity)
    np.testing.assert_array_equal(ahead.prefill(), logits)
    before, history = list(PROMPT), list(PROMPT)
    base = decoder.tokens(logits, cache, Sampler(params), before, interrupt)
    piped = pipelined(
        ahead.step, logits, ahead.cache, Sampler(params), history, interrupt, ahead.stream
    )
    return (base, cache, before), (piped, ahead.cache, history), ahead


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_a_step_ahead_gives_the_same_tokens_and_states_until_the_context_is_full(
    rules: dict[str, Any],
) -> None:
    (base, cache, before), (piped, device_cache, history), ahead = both(20, **rules)
    for count in range(1, 19):
        assert next(piped) == next(base)
        assert history == before
        assert device_cache.length == cache.length == len(history) == 2 + count
        # The token's own step is under way, except where it has no room.
        assert len(ahead.streams_of_steps) == min(count, 17)
    for tokens in (base, piped):
        with pytest.raises(ContextError, match="21 tokens do not fit in the context of 20"):
            next(tokens)
    assert history == before
    assert device_cache.length == 20
    assert len(set(history)) > 3
    rows = np.frombuffer(device_cache.rows(0, 20)[0], np.float32)
    assert rows.tolist() == history


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_reply_that_is_left_leaves_only_rows_of_its_history(count: int) -> None:
    (base, _, before), (piped, cache, history), ahead = both(30)
    assert list(islice(piped, count)) == list(islice(base, count))
    piped.close()
    assert history == before == PROMPT + history[3:]
    assert cache.length == len(history) == 2 + count
    # What goes on afterwards writes over the row that was ahead.
    with mx.stream(ahead.stream):
        logits = np.array(ahead.step(mx.array([31]), cache))
    decoder = Counting(None, None, (), None)  # type: ignore[arg-type]
    expected = decoder.forward(np.array([*history, 31]), LatentCache(1, 1, 30, "f32"))
    np.testing.assert_array_equal(logits, expected)


def test_nothing_is_left_of_tokens_that_nobody_asked_for() -> None:
    _, (piped, cache, history), ahead = both(30)
    piped.close()
    assert (cache.length, history, ahead.streams_of_steps) == (3, PROMPT, [])


def test_an_interrupt_ends_both_before_the_next_row() -> None:
    interrupt = threading.Event()
    (base, _, before), (piped, cache, history), _ = both(30, interrupt)
    for _ in range(4):
        assert next(piped) == next(base)
    interrupt.set()
    for tokens in (base, piped):
        with pytest.raises(Interrupted):
            next(tokens)
    assert history == before
    assert cache.length == len(history) == 6


def test_logits_that_are_not_finite_end_the_reply() -> None:
    ahead = Ahead(30)
    logits = ahead.prefill()
    ahead.good_steps = 2
    history = list(PROMPT)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    piped = pipelined(ahead.step, logits, ahead.cache, sampler, history, None, ahead.stream)
    for _ in range(3):
        next(piped)
    with pytest.raises(ValueError, match=r"the logit of token 0 is -?inf; .* damaged file"):
        next(piped)
    assert ahead.cache.length == len(history) == 6


def test_each_step_is_begun_before_its_token_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (piped, _, _), ahead = both(30)
    log: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args: (log.append(name), function(*args))[1]

    monkeypatch.setattr(_Run, "begin", noted("begin", _Run.begin))
    monkeypatch.setattr(_Run, "read", noted("read", _Run.read))
    monkeypatch.setattr(mx, "eval", noted("wait", mx.eval))
    log.extend("token" for _ in islice(piped, 3))
    piped.close()
    assert log == ["begin", "token", *["begin", "read", "token"] * 2, "wait"]
    assert len(ahead.streams_of_steps) == 3


def test_the_stream_is_entered_for_the_device_only() -> None:
    outside = mx.default_stream(mx.cpu)
    _, (piped, _, _), ahead = both(30)
    for _ in islice(piped, 4):
        assert mx.default_stream(mx.cpu) == outside
    assert ahead.streams_of_steps == [ahead.stream] * 4
    assert ahead.stream != outside


def test_any_thread_may_ask_for_the_next_token() -> None:
    (base, _, _), (piped, _, _), _ = both(30)
    ids: list[int] = []
    for _ in range(6):
        thread = threading.Thread(target=lambda: ids.append(next(piped)))
        thread.start()
        thread.join()
    assert ids == list(islice(base, 6))


# ---- in a session ----


class HostRows(LatentCache):
    """Rows that the host computed, for a decoder that is a step ahead."""

    extend_computed = LatentCache.extend


class PipedDecoder(Decoder[Any]):
    """The model's own layers, a step ahead."""

    def new_cache(self, capacity: int, cache_type: str) -> HostRows:
        return HostRows(self.geometry.layers, self.geometry.cache_width, capacity, cache_type)

    def tokens(
        self,
        logits: Any,
        cache: LatentCache,
        sampler: Sampler,
        history: list[int],
        interrupt: threading.Event | None = None,
    ) -> Generator[int, None, None]:
        def step(ids: Any, cache: Any) -> Any:
            logits = mx.array(self.forward(np.array(ids), cache))
            cache.truncate(cache.length - 1)
            return logits

        stream = mx.default_stream(mx.cpu)
        return pipelined(step, logits, cache, sampler, history, interrupt, stream)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with localds.load(DEMO, threads=1) as loaded:
        yield loaded


def sessions(model: Model, context: int = 256) -> list[Session]:
    own = model.decoder
    piped = PipedDecoder(own.geometry, own.embedding, own.layers, own.head)
    return [
        Session(decoder, model.tokenizer, model.template, context, cache_type="f32")
        for decoder in (own, piped)
    ]


QUESTION = [{"role": "user", "content": "What is localds?"}]


@pytest.mark.parametrize(
    ("options", "context", "finish"),
    [
        ({}, 256, "stop"),
        ({"max_tokens": 9}, 256, "length"),
        ({"max_tokens": 1}, 256, "length"),
        ({"temperature": 1.2, "seed": 4, "top_k": 20, "max_tokens": 30}, 256, "length"),
        ({"stop": ["a"]}, 256, "stop"),
        ({}, 24, "context"),
    ],
    ids=str,
)
def test_a_session_replies_the_same_a_step_ahead(
    model: Model, options: dict[str, Any], context: int, finish: str
) -> None:
    own, piped = sessions(model, context)
    texts = [
        [str(piece) for piece in session.generate(QUESTION, **options)] for session in (own, piped)
    ]
    assert texts[0] == texts[1]
    assert own.tokens == piped.tokens
    assert own.length == piped.length == len(piped.tokens)
    assert own.stats.finish_reason == piped.stats.finish_reason == finish
    assert own.stats.generated_tokens == piped.stats.generated_tokens
    assert piped.stats.decode_seconds > 0


def test_a_session_goes_on_after_a_reply_that_was_left_or_interrupted(model: Model) -> None:
    own, piped = sessions(model)
    whole = "".join(map(str, own.generate(QUESTION)))
    pieces = piped.generate(QUESTION)
    for _ in range(3):
        next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert piped.length == len(piped.tokens)
    interrupt = threading.Event()
    for number, _ in enumerate(piped.generate(QUESTION, interrupt=interrupt)):
        if number == 4:
            interrupt.set()
    assert piped.stats.finish_reason == "interrupted"
    assert piped.length == len(piped.tokens)
    assert "".join(map(str, piped.generate(QUESTION))) == whole

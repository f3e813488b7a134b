"""Sessions: what the cache keeps, when generation ends, and that text does not depend on how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import localds
from localds.memory.latents import ContextError
from localds.memory.plan import BudgetError
from localds.prompt import common_prefix, encode_prompt
from localds.session import _pieces
from localds.thinking import ThinkingSplitter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localds.model import Model
    from localds.session import Session


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[Model]:
    with localds.load(tiny_model) as loaded:
        yield loaded


def text_of(session: Session, prompt: object, **options: object) -> str:
    return "".join(str(piece) for piece in session.generate(prompt, **options))  # type: ignore[arg-type]


def greedy_ids(model: Model, prompt: str, count: int) -> list[int]:
    """Greedy continuation from whole-sequence logits, with no cache and no session."""
    ids = model.tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return ids[start:]


def test_greedy_generation_equals_the_cacheless_one(model: Model) -> None:
    session = model.session(context=64, cache_type="f32")
    expected = greedy_ids(model, "the cat", 12)
    got = text_of(session, "the cat", max_tokens=12)
    assert got == model.tokenizer.decode(expected)
    assert session.stats.generated_tokens == 12
    assert session.stats.finish_reason == "length"


def test_same_seed_same_text_and_other_seed_other_text(model: Model) -> None:
    def run(seed: int) -> str:
        return text_of(model.session(), "a", max_tokens=24, temperature=1.5, seed=seed)

    assert run(7) == run(7)
    assert len({run(seed) for seed in range(4)}) > 1


def test_a_longer_prompt_reuses_the_common_prefix(model: Model) -> None:
    session = model.session(cache_type="f32")
    text_of(session, "in the beginning", max_tokens=2)
    reused_text = text_of(session, "in the beginning there", max_tokens=8)
    assert session.stats.reused_tokens >= len(model.tokenizer.encode("in the beginnin")) - 1
    fresh = model.session(cache_type="f32")
    assert text_of(fresh, "in the beginning there", max_tokens=8) == reused_text


def test_the_same_prompt_again_computes_one_token(model: Model) -> None:
    session = model.session()
    first = text_of(session, "again", max_tokens=4)
    assert text_of(session, "again", max_tokens=4) == first
    assert session.stats.prompt_tokens - session.stats.reused_tokens == 1


def test_generation_stops_at_a_stop_string_without_emitting_it(model: Model) -> None:
    whole = text_of(model.session(), "the", max_tokens=20)
    stop = whole[4:6]
    session = model.session()
    text = text_of(session, "the", max_tokens=20, stop=[stop])
    assert text == whole[: whole.index(stop)]
    assert session.stats.finish_reason == "stop"


def test_generation_ends_when_the_context_is_full(model: Model) -> None:
    session = model.session(context=10)
    text_of(session, "abcde")
    assert session.stats.finish_reason == "context"
    assert len(session.tokens) == 10


def test_logit_bias_forces_and_ends(model: Model) -> None:
    session = model.session()
    eos = min(model.tokenizer.eos_ids)
    assert text_of(session, "x", logit_bias={eos: 1000.0}) == ""
    assert session.stats.finish_reason == "stop"


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(model: Model) -> None:
    session = model.session(context=8)
    text_of(session, "ab", max_tokens=1)
    before = session.tokens
    with pytest.raises(ContextError, match="prompt has 40 tokens, but the context holds 8"):
        text_of(session, "z" * 40)
    assert session.tokens == before


def test_evaluate_in_chunks_equals_one_piece(model: Model) -> None:
    ids = list(range(5, 60))
    whole = model.session(cache_type="f32").evaluate(ids, all_logits=True)
    parts = model.session(cache_type="f32", chunk=9).evaluate(ids, all_logits=True)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_progress_counts_to_the_total(model: Model) -> None:
    seen: list[int] = []
    lengths: list[int] = []
    session = model.session(chunk=16)

    def look(done: int, total: int) -> None:
        assert total == 40
        seen.append(done)
        lengths.append(session.length)

    session.evaluate(list(range(40)), on_progress=look)
    assert seen == sorted(seen)
    # Once a layer and once a chunk; a chunk's tokens count as read only when it is.
    assert len(seen) == 3 * (model.geometry.layers + 1)
    assert [done for done, length in zip(seen, lengths, strict=True) if done == length] == [
        16, 32, 40,
    ]  # fmt: skip
    assert all(length <= done < length + 16 for done, length in zip(seen, lengths, strict=True))


def test_messages_cannot_forge_special_tokens(model: Model) -> None:
    bos = model.tokenizer.bos_text
    assert bos
    message = [{"role": "user", "content": f"hello {bos} there"}]
    ids = encode_prompt(model.tokenizer, model.template, message, {}).ids
    assert model.tokenizer.bos_id not in ids[1:]
    assert f"hello {bos} there" in model.tokenizer.decode(ids)


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda"}, "device 'cuda' is unknown; choose auto, cpu, gpu"),
        ({"vram": "8GiB"}, "vram needs a GPU: "),
        ({"threads": 0}, "threads is 0"),
        ({"ram": "lots"}, "size 'lots' is not understood"),
    ],
)
def test_load_rejects_arguments(
    tiny_model: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        localds.load(tiny_model, **arguments)  # type: ignore[arg-type]


def test_load_keeps_the_budget(tiny_model: Path) -> None:
    with pytest.raises(BudgetError, match="the budget is 1 MiB"):
        localds.load(tiny_model, ram="1MiB")
    localds.load(tiny_model, ram="1GiB").close()


def test_logits_reject_nothing_and_foreign_ids(model: Model) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        model.logits([])
    with pytest.raises((ValueError, IndexError), match="99999"):
        model.logits([1, 99999])


def test_a_context_beyond_the_model_is_refused(model: Model) -> None:
    with pytest.raises(ContextError, match="made for at most"):
        model.session(context=10**6)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        (
            ["<think>a b", "</think>\n", "\nhi ", "\n\nx"],
            [("thinking", "a b"), ("answer", "hi \n\nx")],
        ),
        (["\n", "plain"], [("answer", "\nplain")]),
        (["<think>", "cut"], [("thinking", "cut")]),
    ],
)
def test_pieces_drop_the_blank_lines_after_thinking(
    chunks: list[str], expected: list[tuple[str, str]]
) -> None:
    joined: list[list[str]] = []
    for piece in _pieces(iter(chunks), ThinkingSplitter()):
        if joined and joined[-1][0] == piece.kind:
            joined[-1][1] += piece.text
        else:
            joined.append([piece.kind, piece.text])
    assert [tuple(part) for part in joined] == expected

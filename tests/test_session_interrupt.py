"""Ending a reply from another thread, and going on with one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import localds
from localds.catalog.resolve import DEMO
from localds.models.decoder import Interrupted
from localds.thinking import Reply

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localds.model import Model

QUESTION = [{"role": "user", "content": "What is localds?"}]
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with localds.load(DEMO, threads=1) as loaded:
        yield loaded


def answer(model: Model, **options: object) -> tuple[str, str]:
    session = model.session()
    text = "".join(p.text for p in session.generate(QUESTION, **GREEDY, **options))
    return text, session.stats.finish_reason


class SetAfter(threading.Event):
    """An event that is set once it was asked `times` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def is_set(self) -> bool:
        self.times -= 1
        return self.times < 0


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_prompt_is_left_between_operations(model: Model, times: int) -> None:
    session = model.session()
    pieces = session.generate(QUESTION, **GREEDY, interrupt=SetAfter(times))
    assert list(pieces) == []
    assert session.stats.finish_reason == "interrupted"
    assert session.length == 0


def test_a_reply_is_left_between_operations(model: Model) -> None:
    whole, finish = answer(model)
    assert finish == "stop"
    layers = model.geometry.layers
    part, finish = answer(model, interrupt=SetAfter(2 * layers * 8 + 3))
    assert finish == "interrupted"
    assert 0 < len(part) < len(whole)
    assert whole.startswith(part)


def test_an_interrupted_session_answers_the_next_question_as_a_new_one_does(model: Model) -> None:
    whole, _ = answer(model)
    session = model.session()
    layers = model.geometry.layers
    list(session.generate(QUESTION, **GREEDY, interrupt=SetAfter(2 * layers * 5 + 1)))
    assert "".join(p.text for p in session.generate(QUESTION, **GREEDY)) == whole


def test_evaluate_keeps_the_chunks_before_the_interruption(model: Model) -> None:
    session = model.session(chunk=8)
    ids = np.arange(10, 34)
    with pytest.raises(Interrupted):
        session.evaluate(ids, interrupt=SetAfter(2 * model.geometry.layers + 1))
    assert session.tokens == tuple(range(10, 18))


@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_a_reply_that_was_cut_goes_on_as_if_it_had_not_been(model: Model, tokens: int) -> None:
    whole, _ = answer(model)
    part, finish = answer(model, max_tokens=tokens)
    assert finish == "length"
    rest, finish = answer(model, reply_so_far=Reply("", part))
    assert finish == "stop"
    assert part + rest == whole


@pytest.mark.parametrize(
    ("reply", "opened", "text"),
    [
        (Reply("", "so"), False, "so"),
        (Reply("hm", ""), False, "<think>hm"),
        (Reply("hm", ""), True, "hm"),
        (Reply("hm", "so"), False, "<think>hm</think>\n\nso"),
        (Reply("hm", "so"), True, "hm</think>\n\nso"),
        (Reply("", "so"), True, "</think>\n\nso"),
    ],
)
def test_a_reply_is_written_as_the_model_did(reply: Reply, opened: bool, text: str) -> None:
    assert reply.written(opened=opened) == text

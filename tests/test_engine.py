"""The engine's thread: one job after the other, each of which can be ended."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import localds
from localds.catalog.resolve import DEMO
from localds.thinking import Reply
from tui.engine import Ended, Engine, Loaded, LoadFailed, LoadOptions, Opened
from tui.run import Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUESTION = [{"role": "user", "content": "What is localds?"}]
LONG = [{"role": "user", "content": "Explain: " + "word " * 600}]
GREEDY: dict[str, Any] = {"temperature": 0.0}
BABBLE = {"temperature": 9.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}


class Told:
    """What an engine reports, in order."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()

    def next(self, kind: type) -> Any:
        event = self.events.get(timeout=60)
        assert isinstance(event, kind), event
        return event


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def engine(told: Told) -> Iterator[Engine]:
    made = Engine(told.events.put)
    made.load(str(DEMO), LoadOptions())
    told.next(Loaded)
    yield made
    made.close()
    assert not made._thread.is_alive()


@pytest.fixture(scope="module")
def expected() -> str:
    with localds.load(DEMO) as model:
        return "".join(p.text for p in model.session().generate(QUESTION, **GREEDY))


def test_replies_come_in_the_order_of_the_questions(
    engine: Engine, told: Told, expected: str
) -> None:
    first = engine.answer(Request(QUESTION, GREEDY))
    second = engine.answer(Request(QUESTION, GREEDY))
    assert [told.next(Ended).run, told.next(Ended).run] == [first, second]
    assert first.take() == second.take() == (expected, "")
    assert (first.finish, second.finish) == ("stop", "stop")
    assert first.stats.reused_tokens < second.stats.reused_tokens
    assert first.figures()["generated_tokens"] == first.stats.generated_tokens > 0
    assert 0 < (first.first_token_seconds or 0) < 60


def test_a_reply_that_was_stopped_before_it_began_computes_nothing(
    engine: Engine, told: Told
) -> None:
    first = engine.answer(Request(QUESTION, BABBLE))
    second = engine.answer(Request(QUESTION, GREEDY))
    second.stop()
    first.stop()
    told.next(Ended)
    told.next(Ended)
    assert second.finish == "stopped"
    assert second.stats.generated_tokens == 0


def test_stopping_keeps_what_came_and_the_next_reply_is_right(
    engine: Engine, told: Told, expected: str
) -> None:
    run = engine.answer(Request(QUESTION, BABBLE))
    while run.first_piece is None:
        time.sleep(0.001)
    engine.stop()
    told.next(Ended)
    assert run.finish == "stopped"
    assert run.take()[0]
    engine.answer(Request(QUESTION, GREEDY))
    assert told.next(Ended).run.take()[0] == expected


def test_a_question_ends_the_opening_of_a_chat(engine: Engine, told: Told) -> None:
    engine.open(LONG)
    engine.answer(Request(QUESTION, GREEDY))
    events = [told.events.get(timeout=60)]
    if isinstance(events[0], Opened):  # it was done before the question came
        events.append(told.events.get(timeout=60))
    assert isinstance(events[-1], Ended)
    assert events[-1].run.finish == "stop"


def test_an_opened_chat_is_read_from_disk_the_second_time(engine: Engine, told: Told) -> None:
    engine.open(LONG)
    first = told.next(Opened)
    assert first.computed > 500
    run = engine.answer(Request(LONG, {**GREEDY, "max_tokens": 2}))
    told.next(Ended)
    assert run.stats.reused_tokens == run.stats.prompt_tokens - 1

    again = Told()
    other = Engine(again.events.put)
    other.load(str(DEMO), LoadOptions())
    again.next(Loaded)
    while not other.ready:
        time.sleep(0.01)
    other.open(LONG)
    second = again.next(Opened)
    other.close()
    assert second.restored > 500
    assert second.computed <= 32


def test_a_reply_goes_on(engine: Engine, told: Told, expected: str) -> None:
    engine.answer(Request(QUESTION, {**GREEDY, "max_tokens": 5}))
    part = told.next(Ended).run.take()[0]
    engine.answer(Request(QUESTION, GREEDY, Reply("", part)))
    assert part + told.next(Ended).run.take()[0] == expected


def test_errors_are_told_and_the_engine_goes_on(engine: Engine, told: Told, tmp_path: Path) -> None:
    run = engine.answer(Request([{"role": "user", "content": "word " * 5000}], GREEDY))
    told.next(Ended)
    assert run.finish is not None
    assert run.finish.startswith("error: the prompt has")
    run = engine.answer(Request(QUESTION, {"temperature": -1}))
    told.next(Ended)
    assert "temperature" in (run.finish or "")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(50))
    engine.load(str(tmp_path / "broken.gguf"), LoadOptions())
    assert "broken.gguf" in told.next(LoadFailed).message
    assert told.next(Loaded).name == str(DEMO)
    engine.load(str(DEMO), LoadOptions(ram="1MiB"))
    assert "MiB" in told.next(LoadFailed).message
    assert told.next(Loaded).options == LoadOptions()
    run = engine.answer(Request(QUESTION, GREEDY))
    told.next(Ended)
    assert run.finish == "stop"
    engine.load(str(DEMO), LoadOptions(context=64))
    assert told.next(Loaded).context == 64
    engine.load(str(DEMO), LoadOptions(context=10**6))
    assert told.next(Loaded).context == 2048


def test_without_a_model_questions_are_refused(told: Told, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(50))
    engine = Engine(told.events.put)
    engine.load(str(tmp_path / "broken.gguf"), LoadOptions())
    told.next(LoadFailed)
    run = engine.answer(Request(QUESTION, GREEDY))
    told.next(Ended)
    assert run.finish == "error: no model is loaded; choose one with /model"
    assert engine.count_tokens("abcdefgh") == 2
    engine.close()


def test_readings_and_counts_come_from_any_thread_meanwhile(engine: Engine, told: Told) -> None:
    run = engine.answer(Request(QUESTION, BABBLE))
    failures: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(200):
                assert engine.reading() is not None
                assert engine.count_tokens("some words") > 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.stop()
    told.next(Ended)
    assert not failures


def test_closing_ends_what_runs(told: Told) -> None:
    engine = Engine(told.events.put)
    engine.load(str(DEMO), LoadOptions())
    told.next(Loaded)
    run = engine.answer(Request(QUESTION, BABBLE))
    while run.first_piece is None:
        time.sleep(0.001)
    engine.close()
    assert not engine._thread.is_alive()
    assert run.finish == "stopped"
    assert not engine.ready

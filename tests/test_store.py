"""The store of chats against a model in plain Python; threads and changes by other apps."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from chat_stores import chain, change, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tui.store import Attachment, ConversationStore, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "chats.db"


@pytest.fixture
def store(path: Path) -> Iterator[ConversationStore]:
    with ConversationStore(path) as opened:
        yield opened


# Conversations


def test_a_conversation_keeps_what_is_set(store: ConversationStore, path: Path) -> None:
    before = time.time()
    new = store.create("Title", "model:Q4", {"temperature": 0.5, "stop": ["ä"]})
    assert new == store.conversation(new.id)
    assert before <= new.created == new.updated <= time.time()
    store.rename(new.id, "Other")
    store.set_model(new.id, "model:Q8")
    store.set_settings(new.id, {"seed": 1})
    expected = replace(new, title="Other", model="model:Q8", settings={"seed": 1})
    assert store.conversation(new.id) == expected
    store.close()
    with ConversationStore(path) as again:
        assert again.conversations() == [expected]


def test_conversations_come_last_updated_first(store: ConversationStore) -> None:
    first, second, third = (store.create(title) for title in "abc")
    store.add(second.id, None, "user", "hello")
    store.rename(first.id, "renaming does not count")
    assert [c.id for c in store.conversations()] == [second.id, third.id, first.id]


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("", "abcd"),
        ("straße", "a"),
        ("STRASSE", "a"),
        ("привет", "b"),
        ("100%", "c"),
        ("%", "c"),
        ("_", "d"),
        ("\\", "d"),
        ("\\%", ""),
        ("*", ""),
        ("after the nul", "d"),
        ("' OR 1=1 --", ""),
        ("secret thought", ""),
    ],
)
def test_search_is_for_a_plain_substring(store: ConversationStore, search: str, found: str) -> None:
    texts = {
        "a": ("Große Straße", "one"),
        "b": ("b", "...ПРИВЕТ, МИР"),
        "c": ("c", "of 100% wool"),
        "d": ("snake_case\\", "x\0after the NUL"),
    }
    names = {}
    for name, (title, text) in texts.items():
        conversation = store.create(title)
        names[conversation.id] = name
        root = store.add(conversation.id, None, "user", text, thinking="secret thought")
        store.add(conversation.id, root.id, "assistant", "reply")
    assert {names[c.id] for c in store.conversations(search)} == set(found)


def test_search_finds_other_branches_but_nothing_deleted(store: ConversationStore) -> None:
    conversation = store.create()
    store.add(conversation.id, None, "user", "needle")
    store.add(conversation.id, None, "user", "hay")
    assert len(store.conversations("Needle")) == 1
    store.delete(conversation.id)
    assert store.conversations("Needle") == []


def test_deleting_can_be_undone_within_the_hour(store: ConversationStore, path: Path) -> None:
    conversation, messages = chain(store, 3)
    before = rows(path)
    store.delete(conversation.id)
    assert store.conversations() == []
    with pytest.raises(StoreError, match=f"conversation {conversation.id} is gone"):
        store.conversation(conversation.id)
    change(path, "UPDATE conversations SET deleted = ?", time.time() - 3590)
    with ConversationStore(path) as other:
        other.purge()
    # A reply that is still being written is part of what comes back.
    store.update(messages[-1].id, content="the end")
    store.undelete(conversation.id)
    assert store.branch(conversation.id)[-1].content == "the end"
    store.update(messages[-1].id, content=messages[-1].content)
    assert rows(path) == before


def test_purging_removes_for_good(store: ConversationStore, path: Path) -> None:
    attachment = Attachment("a.txt", "swordfish" * 2000, 9)
    kept, gone = store.create("kept"), store.create("gone swordfish")
    for conversation in (kept, gone):
        text = "swordfish " * 1000 if conversation is gone else "text"
        store.add(conversation.id, None, "user", text, attachments=[attachment, attachment])
    store.update(store.branch(kept.id)[0].id, content="kept")
    change(path, "DELETE FROM attachments WHERE message = 1")
    store.delete(gone.id)
    change(path, "UPDATE conversations SET deleted = ? WHERE deleted > 0", time.time() - 3610)
    store.purge()
    with pytest.raises(StoreError, match="is gone"):
        store.undelete(gone.id)
    left = rows(path)
    assert [len(left[t]) for t in ("conversations", "messages", "attachments")] == [1, 1, 0]
    store.close()
    assert b"swordfish" not in path.read_bytes()


def test_settings_of_all_models_and_of_one(store: ConversationStore) -> None:
    assert store.settings("") == {}
    store.save_settings("", {"theme": "nord", "stop": ["\n"]})
    store.save_settings("m", {"seed": 1})
    store.save_settings("m", {"top_k": 2})
    assert store.settings("") == {"theme": "nord", "stop": ["\n"]}
    assert store.settings("m") == {"top_k": 2}


@pytest.mark.parametrize("bad", [{"a": math.nan}, {"a": {1, 2}}, {"a": b""}])
def test_settings_that_are_not_json_are_refused(store: ConversationStore, bad: Any) -> None:
    conversation = store.create(settings={"a": 1})
    for save in (
        lambda: store.save_settings("", bad),
        lambda: store.set_settings(conversation.id, bad),
        lambda: store.create(settings=bad),
    ):
        with pytest.raises(StoreError, match="only what JSON can hold is saved"):
            save()
    assert store.conversations() == [conversation]


# Messages


def test_a_message_keeps_what_is_set(store: ConversationStore) -> None:
    conversation = store.create()
    attachments = (Attachment("b", "\0 ü\r\n", 3), Attachment("a", "", 0))
    question = store.add(conversation.id, None, "user", "Why?", attachments=attachments)
    reply = store.add(conversation.id, question.id, "assistant", "", thinking="h", model="m")
    assert (question.parent, question.attachments, question.finish) == (None, attachments, "")
    assert store.branch(conversation.id) == [question, reply]
    store.update(reply.id, content="Because", thinking="hm")
    store.update(reply.id, finish="stop", stats={"tokens": 3, "seconds": 0.5})
    store.update(reply.id, thinking_seconds=1.5)
    expected = replace(
        reply,
        content="Because",
        thinking="hm",
        thinking_seconds=1.5,
        finish="stop",
        stats={"tokens": 3, "seconds": 0.5},
    )
    assert store.branch(conversation.id) == [question, expected]
    store.update(reply.id, content="")
    assert store.branch(conversation.id)[1].content == ""


class Oracle:
    """The trees of messages in plain Python: parents and leaves by id."""

    def __init__(self) -> None:
        self.parents: dict[int, int | None] = {}

    def branch(self, leaf: int | None) -> list[int]:
        return [] if leaf is None else [*self.branch(self.parents[leaf]), leaf]

    def siblings(self, message: int) -> list[int]:
        return [m for m, p in self.parents.items() if p == self.parents[message]]

    def newest(self, message: int) -> int:
        children = [m for m, p in self.parents.items() if p == message]
        return self.newest(children[-1]) if children else message


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_branches_are_those_of_a_plain_tree(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]
) -> None:
    oracles: dict[int, Oracle] = {}
    with ConversationStore(tmp_path_factory.mktemp("store") / "chats.db") as store:
        for _ in range(2):
            oracles[store.create().id] = Oracle()
        for i, (action, choice) in enumerate(steps):
            conversation = 1 + i % 2
            oracle = oracles[conversation]
            some = [None, *oracle.parents][choice % (len(oracle.parents) + 1)]
            if action < 4:
                new = store.add(conversation, some, "user", str(i))
                oracle.parents[new.id] = some
                leaf: int | None = new.id
            elif action == 4 or some is None:
                store.set_leaf(conversation, some)
                leaf = some
            else:
                leaf = oracle.newest(some)
                assert [m.id for m in store.select(some)] == oracle.branch(leaf)
            assert store.conversation(conversation).leaf == leaf
            assert [m.id for m in store.branch(conversation)] == oracle.branch(leaf)
        for oracle in oracles.values():
            for message in oracle.parents:
                assert store.siblings(message) == oracle.siblings(message)


def test_a_parent_must_be_of_the_conversation(store: ConversationStore, path: Path) -> None:
    first, second = store.create(), store.create()
    message = store.add(first.id, None, "user", "hello")
    before = rows(path)
    with pytest.raises(StoreError, match="message 1 is not of conversation 2"):
        store.add(second.id, message.id, "assistant", "no")
    with pytest.raises(StoreError, match="message 1 is not of conversation 2"):
        store.set_leaf(second.id, message.id)
    with pytest.raises(StoreError, match="message 77 is gone"):
        store.add(second.id, 77, "assistant", "no")
    with pytest.raises(StoreError, match="role 'system' is unknown"):
        store.add(second.id, None, "system", "no")  # type: ignore[arg-type]
    assert rows(path) == before


def test_what_is_gone_is_told(store: ConversationStore) -> None:
    for call in (
        store.conversation,
        store.branch,
        store.tree,
        store.delete,
        store.undelete,
        lambda number: store.rename(number, ""),
        lambda number: store.set_model(number, ""),
        lambda number: store.set_settings(number, {}),
        lambda number: store.set_leaf(number, None),
        lambda number: store.add(number, None, "user", ""),
    ):
        with pytest.raises(StoreError, match="conversation 9 is gone"):
            call(9)
    for call in (store.siblings, store.select, lambda m: store.update(m, content="")):
        with pytest.raises(StoreError, match="message 9 is gone"):
            call(9)


def test_half_a_character_is_refused(store: ConversationStore, path: Path) -> None:
    conversation, _ = chain(store, 1)
    before = rows(path)
    with pytest.raises(StoreError, match=r"holds '\\ud800', half of a character"):
        store.add(conversation.id, None, "user", "a\ud800")
    with pytest.raises(StoreError, match="half of a character"):
        store.add(conversation.id, None, "user", "a", attachments=[Attachment("n", "\ud800", 1)])
    assert rows(path) == before


def test_long_branches_are_fast_and_do_not_recurse(store: ConversationStore, path: Path) -> None:
    conversation, messages = chain(store, 2000)
    times = []
    for _ in range(5):
        started = time.process_time()
        branch = store.branch(conversation.id)
        times.append(time.process_time() - started)
    assert branch == messages
    assert min(times) < 0.05
    store.set_leaf(conversation.id, None)
    assert store.select(messages[0].id) == messages
    store.delete(conversation.id)
    change(path, "UPDATE conversations SET deleted = 0")
    store.purge()
    assert rows(path)["messages"] == []


def test_questions_asked_before_come_once_the_newest_last(store: ConversationStore) -> None:
    first, gone = store.create(), store.create()
    for text in ("one", "two", "", "one", "three"):
        question = store.add(first.id, None, "user", text)
        store.add(first.id, question.id, "assistant", "reply")
    store.add(gone.id, None, "user", "deleted")
    store.delete(gone.id)
    assert store.questions(10) == ["two", "one", "three"]
    assert store.questions(2) == ["one", "three"]


# Threads and other apps


def test_threads_share_the_store(store: ConversationStore) -> None:
    conversation = store.create()

    def write(name: str) -> None:
        for i in range(50):
            store.add(conversation.id, None, "user", f"{name} {i}")
            store.branch(conversation.id)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    counter = store.change_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [m.content for m in store.tree(conversation.id)[1]]
    assert sorted(texts) == sorted(f"{name} {i}" for name in "abcd" for i in range(50))
    assert store.change_counter() == counter


def test_the_change_counter_tells_of_other_apps(store: ConversationStore, path: Path) -> None:
    conversation = store.create()
    with ConversationStore(path) as other:
        counter = store.change_counter()
        store.rename(conversation.id, "own change")
        assert store.change_counter() == counter
        other.rename(conversation.id, "theirs")
        assert store.change_counter() != counter
        counter = store.change_counter()
        other.branch(conversation.id)
        other.purge()
        assert store.change_counter() == counter

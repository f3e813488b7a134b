"""Chats as Markdown, and as JSON and back: round trips, and documents that are broken."""

from __future__ import annotations

import copy
import json
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tui.store import (
    Attachment,
    Conversation,
    ConversationStore,
    Message,
    StoreError,
    from_json,
    to_json,
    to_markdown,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

texts = st.text(max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
attachments = st.builds(Attachment, texts, texts, st.integers(0, 2**63 - 1))
message_parts = st.tuples(
    st.integers(0, 99),
    st.sampled_from(["user", "assistant"]),
    texts,
    texts,
    st.lists(attachments, max_size=2),
    numbers,
    st.sampled_from(["", "stop", "error: no"]),
    texts,
    st.dictionaries(texts, numbers | st.integers(-(2**70), 2**70), max_size=2),
)
fixture_is_fine = [HealthCheck.function_scoped_fixture]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ConversationStore]:
    with ConversationStore(tmp_path / "chats.db") as opened:
        yield opened


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def grow(store: ConversationStore, title: str, chat_settings: Any, parts: Any) -> int:
    """A conversation with a tree of messages in it."""
    conversation = store.create(title, "model", chat_settings).id
    ids: list[int | None] = [None]
    for choice, role, content, thinking, files, seconds, finish, model, stats in parts:
        parent = ids[choice % len(ids)]
        new = store.add(
            conversation, parent, role, content, thinking=thinking, attachments=files, model=model
        )
        store.update(new.id, thinking_seconds=seconds, finish=finish, stats=stats)
        ids.append(new.id)
    store.set_leaf(conversation, ids[len(parts) // 2])
    return conversation


def numbered(store: ConversationStore, conversation: int) -> tuple[Conversation, list[Message]]:
    """The conversation with its messages, ids counted from 1."""
    found, messages = store.tree(conversation)
    new: dict[int | None, Any] = {None: None}
    new |= {message.id: i for i, message in enumerate(messages, 1)}
    return replace(found, id=0, leaf=new[found.leaf]), [
        replace(m, id=new[m.id], conversation=0, parent=new[m.parent]) for m in messages
    ]


@given(texts, st.dictionaries(texts, json_values, max_size=3), st.lists(message_parts, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=fixture_is_fine)
def test_everything_comes_back(
    store: ConversationStore, title: str, chat_settings: Any, parts: Any
) -> None:
    old = grow(store, title, chat_settings, parts)
    text = to_json(store, old)
    new = from_json(store, text)
    assert new == store.conversation(new.id)
    assert new.id != old
    assert numbered(store, new.id) == numbered(store, old)
    assert to_json(store, new.id) == text
    assert [m.content for m in store.branch(new.id)] == [m.content for m in store.branch(old)]


def test_the_document_says_what_it_is(store: ConversationStore) -> None:
    conversation = store.create("Süß")
    document = json.loads(to_json(store, conversation.id))
    assert (document["format"], document["version"]) == ("localds-chat", 1)
    assert "Süß" in to_json(store, conversation.id)


def test_long_chains_come_back(store: ConversationStore) -> None:
    conversation, parent = store.create().id, None
    for i in range(3000):
        parent = store.add(conversation, parent, "user", str(i)).id
    new = from_json(store, to_json(store, conversation))
    assert [m.content for m in store.branch(new.id)] == [str(i) for i in range(3000)]


def test_what_is_gone_cannot_be_exported(store: ConversationStore) -> None:
    with pytest.raises(StoreError, match="conversation 5 is gone"):
        to_json(store, 5)


# Broken documents


def sample(store: ConversationStore) -> dict[str, Any]:
    conversation = store.create("Title", "m", {"system": "Be brief."})
    file = Attachment("a.txt", "text", 3)
    question = store.add(conversation.id, None, "user", "Why?", attachments=[file])
    reply = store.add(conversation.id, question.id, "assistant", "So.", model="m")
    store.update(reply.id, finish="stop", stats={"tokens": 2})
    store.add(conversation.id, None, "user", "Other")
    document: dict[str, Any] = json.loads(to_json(store, conversation.id))
    return document


def refuse(store: ConversationStore, path: Path, text: str) -> str:
    """The message with which the text is refused; the store stays as it is."""
    before = dump(path)
    with pytest.raises(StoreError) as error:
        from_json(store, text)
    assert dump(path) == before
    message = str(error.value)
    assert message.startswith(("importing a chat: ", "saving the settings of a chat: ", "chats in"))
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["format"], "chatgpt", '"format" is not "localds-chat"'),
        (["version"], 2, "written by a newer localds"),
        (["version"], "1", '"version" is a text'),
        (["version"], True, '"version" is true'),
        (["title"], None, '"title" is null; it must be a text'),
        (["settings"], [], '"settings" is a list; it must be an object'),
        (["settings", "a"], float("inf"), "only what JSON can hold"),
        (["created"], "now", '"created" is a text; it must be a finite number'),
        (["updated"], float("nan"), '"updated" is NaN'),
        (["updated"], 10**400, '"updated" is 1000'),
        (["leaf"], 9, '"leaf" names message 9, which is not there'),
        (["leaf"], 1.0, '"leaf" is 1.0; it must be a whole number'),
        (["messages"], {}, '"messages" is an object; it must be a list'),
        (["messages", 1], "hi", "message 2 of 3 is a text; it must be an object"),
        (["messages", 1, "id"], 1, "two messages with the id 1"),
        (["messages", 1, "id"], 2**63, '"id" of message 2 of 3 is 9223372036854775808'),
        (["messages", 0, "parent"], 2, "the parent of message 1 is 2, which is not before it"),
        (["messages", 0, "parent"], 1, "the parent of message 1 is 1, which is not before it"),
        (["messages", 1, "parent"], 77, "the parent of message 2 is 77, which is not before it"),
        (["messages", 1, "parent"], True, '"parent" of message 2 of 3 is true'),
        (["messages", 1, "role"], "system", 'must be "user" or "assistant"'),
        (["messages", 1, "role"], [], '"role" of message 2 of 3 is a list'),
        (["messages", 1, "content"], 5, '"content" of message 2 of 3 is 5; it must be a text'),
        (["messages", 1, "content"], "\ud800", "half of a character"),
        (["messages", 1, "stats"], {"x": "y"}, "the figure 'x' of message 2 of 3 is a text"),
        (["messages", 1, "thinking_seconds"], None, "must be a finite number"),
        (["messages", 0, "attachments"], "a", '"attachments" of message 1 of 3 is a text'),
        (["messages", 0, "attachments", 0], 1, "an attachment of message 1 of 3 is 1"),
        (["messages", 0, "attachments", 0, "tokens"], -1, '"tokens" of an attachment of message 1'),
        (["messages", 0, "colour"], "red", "'colour' in message 1 of 3 is unknown"),
    ],
)
def test_a_broken_document_is_refused(
    store: ConversationStore, tmp_path: Path, place: list[Any], value: Any, message: str
) -> None:
    document = sample(store)
    part = document
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    assert message in refuse(store, tmp_path / "chats.db", json.dumps(document))


def test_every_key_is_needed(store: ConversationStore, tmp_path: Path) -> None:
    document = sample(store)
    for place in ([], ["messages", 0], ["messages", 0, "attachments", 0]):
        part: Any = document
        for key in place:
            part = part[key]
        for key in list(part):
            kept = part.pop(key)
            message = refuse(store, tmp_path / "chats.db", json.dumps(document))
            assert f'"{key}" is' in message
            part[key] = kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON"),
        ("# Chat", "it is not JSON"),
        ("[]", "the document is a list; it must be an object"),
        ("null", "the document is null"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ('{"version": ' + "9" * 10_000 + "}", "it is not JSON"),
    ],
    ids=range(7),
)
def test_what_is_no_document_is_refused(
    store: ConversationStore, tmp_path: Path, text: str, message: str
) -> None:
    assert message in refuse(store, tmp_path / "chats.db", text)


@pytest.mark.parametrize("depth", [40, 400, 900])
def test_deep_settings_are_refused(store: ConversationStore, tmp_path: Path, depth: int) -> None:
    document = sample(store)
    document["settings"] = {"a": "HERE"}
    text = json.dumps(document).replace('"HERE"', "[" * depth + "]" * depth)
    message = refuse(store, tmp_path / "chats.db", text)
    assert "nested" in message


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=fixture_is_fine)
def test_whatever_is_changed_is_imported_or_refused(
    store: ConversationStore, tmp_path: Path, data: Any
) -> None:
    if not store.conversations("Why?"):
        sample(store)
    first = min(store.conversations("Why?"), key=lambda c: c.id)
    document = json.loads(to_json(store, first.id))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list(places(document))))
        container[key] = copy.deepcopy(data.draw(json_values))
    text = json.dumps(document)
    before = dump(tmp_path / "chats.db")
    try:
        new = from_json(store, text)
    except StoreError:
        assert dump(tmp_path / "chats.db") == before
    else:
        again = json.loads(to_json(store, new.id))
        assert [m["content"] for m in again["messages"]] == [
            m["content"] for m in document["messages"]
        ]
        assert again["settings"] == document["settings"]


# Markdown


def message(content: str, **other: Any) -> Message:
    plain = Message(1, 1, None, "assistant", content, "", 0.0, (), "stop", "m", {}, 0.0)
    return replace(plain, **other)


def test_markdown_has_title_system_prompt_roles_thinking_and_files() -> None:
    conversation = Conversation(1, "A\ntitle", "m", {"system": "Be brief."}, 2, 0.0, 0.0)
    question = message("Why?", role="user", attachments=(Attachment("a.py", "x = 1\n", 3),))
    reply = message("So.", thinking="Hm.\n\n</details> ```", thinking_seconds=12.4)
    assert to_markdown(conversation, [question, reply]) == (
        "# A title\n\n"
        "## System\n\nBe brief.\n\n"
        "## User\n\nAttached: a.py\n\n```\nx = 1\n```\n\nWhy?\n\n"
        "## Assistant\n\n"
        "<details>\n<summary>Thinking (12 s)</summary>\n\n"
        "> Hm.\n>\n> &lt;/details> ```\n\n</details>\n\n"
        "So.\n"
    )


def test_markdown_of_an_empty_chat() -> None:
    assert to_markdown(Conversation(1, "", "", {}, None, 0.0, 0.0), []) == "# Untitled chat\n"


@given(st.text(alphabet="`a\n"))
def test_no_fence_inside_a_file_ends_it(text: str) -> None:
    file = message("END", attachments=(Attachment("a", text, 1),))
    lines = to_markdown(Conversation(1, "t", "", {}, 1, 0.0, 0.0), [file]).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("```"))
    fence = lines[start]
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(fence))
    inside = "\n".join(lines[start + 1 : end])
    assert inside == text.removesuffix("\n")
    assert "".join(lines[end:]) == fence + "END"
    assert max(map(len, re.findall("`+", text)), default=0) < len(fence)


@pytest.mark.parametrize(
    ("content", "closed"),
    [
        ("```python\nx", "```python\nx\n```"),
        ("````\n```\nx", "````\n```\nx\n````"),
        ("~~~\n```", "~~~\n```\n~~~"),
        ("```\nx\n```", "```\nx\n```"),
        ("```\nx\n``` no end", "```\nx\n``` no end\n```"),
        ("```\nx\n`````", "```\nx\n`````"),
        ("```inline``` text", "```inline``` text"),
        ("  ```\nx", "  ```\nx\n```"),
    ],
)
def test_a_code_block_cut_short_is_ended(content: str, closed: str) -> None:
    text = to_markdown(Conversation(1, "t", "", {}, 1, 0.0, 0.0), [message(content)])
    assert text == f"# t\n\n## Assistant\n\n{closed}\n"

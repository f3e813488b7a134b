"""Between the records and the rows of the tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tui.store.error import StoreError
from tui.store.records import Attachment, Conversation, Message

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

_DEEPEST = 32
_BRANCH = """WITH RECURSIVE branch (id, parent) AS (
    SELECT id, parent FROM messages WHERE id = ?
    UNION
    SELECT messages.id, messages.parent FROM branch JOIN messages ON messages.id = branch.parent
) """
_NEWEST = """WITH RECURSIVE line (id) AS (
    SELECT :id
    UNION
    SELECT (SELECT max(id) FROM messages WHERE conversation = :conversation AND parent = line.id)
    FROM line WHERE line.id IS NOT NULL
) SELECT max(id) FROM line"""
_MESSAGES = """SELECT id, conversation, parent, role, content, thinking, thinking_seconds, finish,
    model, stats, created FROM messages """
_ATTACHMENTS = "SELECT message, name, text, tokens FROM attachments "


def conversation_from(row: tuple[Any, ...]) -> Conversation:
    """A row of id, title, model, settings, leaf, created, updated."""
    number, title, model, settings, leaf, created, updated = row
    where = f"conversation {number}"
    return Conversation(number, title, model, from_text(settings, where), leaf, created, updated)


def branch_to(connection: sqlite3.Connection, leaf: int | None) -> list[Message]:
    """The messages from the root to `leaf`."""
    chosen = "WHERE {} IN (SELECT id FROM branch) ORDER BY id"
    return _messages(
        connection.execute(_BRANCH + _MESSAGES + chosen.format("id"), (leaf,)),
        connection.execute(_BRANCH + _ATTACHMENTS + chosen.format("message"), (leaf,)),
    )


def all_messages(connection: sqlite3.Connection, conversation: int) -> list[Message]:
    """The messages of every branch, oldest first."""
    chosen = "WHERE message IN (SELECT id FROM messages WHERE conversation = ?) ORDER BY id"
    return _messages(
        connection.execute(_MESSAGES + "WHERE conversation = ? ORDER BY id", (conversation,)),
        connection.execute(_ATTACHMENTS + chosen, (conversation,)),
    )


def newest_descendant(connection: sqlite3.Connection, conversation: int, message: int) -> int:
    """The end of the line from `message` that follows the last-added child at each step."""
    values = {"id": message, "conversation": conversation}
    return int(connection.execute(_NEWEST, values).fetchone()[0])


def insert_message(connection: sqlite3.Connection, message: Message) -> int:
    """Write the message with its attachments under a new id, which is returned."""
    cursor = connection.execute(
        "INSERT INTO messages (conversation, parent, role, content, thinking, thinking_seconds, "
        "finish, model, stats, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            message.conversation,
            message.parent,
            message.role,
            message.content,
            message.thinking,
            message.thinking_seconds,
            message.finish,
            message.model,
            to_text(message.stats, "the figures of a reply"),
            message.created,
        ),
    )
    number = int(cursor.lastrowid or 0)
    connection.executemany(
        "INSERT INTO attachments (message, name, text, tokens) VALUES (?, ?, ?, ?)",
        [(number, a.name, a.text, a.tokens) for a in message.attachments],
    )
    return number


def to_text(values: Mapping[str, Any], what: str) -> str:
    """The values as JSON; raises `StoreError` for what JSON cannot hold, and for deep nesting."""
    # What is only just shallow enough to be written might be too deep to be read again.
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise StoreError(f"saving {what}: nested more than {_DEEPEST} deep; make them flatter")
    try:
        return json.dumps(dict(values), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"saving {what}: {error}; only what JSON can hold is saved") from None


def from_text(text: str, what: str) -> dict[str, Any]:
    """The values of a JSON object; raises `StoreError` for a text that was tampered with."""
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise StoreError(f"{what} holds {text!r:.80}, no JSON object; the file was damaged")
    return values


def _inside(value: object) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _messages(rows: sqlite3.Cursor, attachments: sqlite3.Cursor) -> list[Message]:
    attached: dict[int, list[Attachment]] = defaultdict(list)
    for message, name, text, tokens in attachments:
        attached[message].append(Attachment(name, text, tokens))
    return [
        Message(
            number,
            conversation,
            parent,
            role,
            content,
            thinking,
            seconds,
            tuple(attached.get(number, ())),
            finish,
            model,
            from_text(stats, f"message {number}"),
            created,
        )
        for (
            number,
            conversation,
            parent,
            role,
            content,
            thinking,
            seconds,
            finish,
            model,
            stats,
            created,
        ) in rows
    ]

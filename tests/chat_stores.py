"""What the tests of the store of chats share."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from tui.store import Conversation, ConversationStore, Message

TABLES = ("conversations", "messages", "attachments", "settings")


def rows(path: Path) -> dict[str, list[Any]]:
    """Everything in the file."""
    with closing(sqlite3.connect(path)) as connection:
        return {t: connection.execute(f"SELECT * FROM {t}").fetchall() for t in TABLES}  # noqa: S608


def change(path: Path, statement: str, *values: object) -> None:
    """Change the file as another program could."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, values)


def chain(store: ConversationStore, length: int) -> tuple[Conversation, list[Message]]:
    conversation = store.create("long")
    messages: list[Message] = []
    for i in range(length):
        parent = messages[-1].id if messages else None
        role = "assistant" if i % 2 else "user"
        messages.append(store.add(conversation.id, parent, role, f"text {i}"))
    return store.conversation(conversation.id), messages

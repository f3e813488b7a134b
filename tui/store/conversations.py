"""The store of chats, as the app uses it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, get_args

from localds.settings import state_folder
from tui.store import rows
from tui.store.database import Database
from tui.store.error import StoreError
from tui.store.records import Attachment, Conversation, Message, Role

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_UNDO_SECONDS = 3600
_CONVERSATIONS = (
    "SELECT id, title, model, settings, leaf, created, updated FROM conversations "
    "WHERE deleted IS NULL "
)


class ConversationStore:
    """All chats of the user, in the file `path` (default: in localds's state folder).

    May be used from several threads, and by several apps on one file. Every method is one
    transaction, written to the file when it returns, and raises `StoreError`, also for a
    conversation or message that is gone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._database = Database(path or state_folder() / "chats.db")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def change_counter(self) -> int:
        """A number that changes when another app has written to the file."""
        return self._database.change_counter()

    # Conversations

    def conversations(self, search: str = "") -> list[Conversation]:
        """Those whose title or messages contain `search` in any case, last updated first."""
        found, values = "", {}
        if search:
            values = {"search": search.casefold()}
            found = (
                "AND (contains(title, :search) OR EXISTS (SELECT 1 FROM messages "
                "WHERE conversation = conversations.id AND contains(content, :search))) "
            )
        query = _CONVERSATIONS + found + "ORDER BY updated DESC, id DESC"
        with self._database.reading() as connection:
            return [rows.conversation_from(row) for row in connection.execute(query, values)]

    def create(
        self, title: str = "", model: str = "", settings: Mapping[str, Any] | None = None
    ) -> Conversation:
        """Add an empty conversation."""
        now = time.time()
        new = Conversation(0, title, model, settings or {}, None, now, now)
        return self.insert(new, ())

    def insert(self, conversation: Conversation, messages: Sequence[Message]) -> Conversation:
        """Add a copy of the conversation and of all its messages, under new ids.

        The given ids only say which message is whose parent and which the leaf; parents stand
        before their children.
        """
        ids: dict[int | None, int | None] = {None: None}
        with self._database.writing() as connection:
            new = _insert_conversation(connection, conversation)
            for message in messages:
                moved = replace(message, conversation=new, parent=ids[message.parent])
                ids[message.id] = rows.insert_message(connection, moved)
            _point(connection, new, ids[conversation.leaf])
            return _conversation(connection, new)

    def conversation(self, id: int) -> Conversation:  # noqa: A002  the record's own name for it
        """Look up one conversation."""
        with self._database.reading() as connection:
            return _conversation(connection, id)

    def rename(self, id: int, title: str) -> None:  # noqa: A002
        """Give the conversation another title."""
        self._change(id, "UPDATE conversations SET title = ? WHERE id = ?", title)

    def set_model(self, id: int, model: str) -> None:  # noqa: A002
        """Note the model that the conversation goes on with."""
        self._change(id, "UPDATE conversations SET model = ? WHERE id = ?", model)

    def set_settings(self, id: int, settings: Mapping[str, Any]) -> None:  # noqa: A002
        """Replace the settings of this conversation, which must be JSON values."""
        text = rows.to_text(settings, "the settings of a chat")
        self._change(id, "UPDATE conversations SET settings = ? WHERE id = ?", text)

    def delete(self, id: int) -> None:  # noqa: A002
        """Hide the conversation, until `undelete` or, after an hour, `purge`."""
        self._change(id, "UPDATE conversations SET deleted = ? WHERE id = ?", time.time())

    def undelete(self, id: int) -> None:  # noqa: A002
        """Bring a deleted conversation back."""
        with self._database.writing() as connection:
            query = "UPDATE conversations SET deleted = NULL WHERE id = ?"
            if not connection.execute(query, (id,)).rowcount:
                raise _gone(id)

    def purge(self) -> None:
        """Remove for good what was deleted more than an hour ago, too long for an undo."""
        with self._database.writing() as connection:
            # The rest goes with it, by the foreign keys.
            connection.execute(
                "DELETE FROM conversations WHERE deleted < ?", (time.time() - _UNDO_SECONDS,)
            )

    # Messages

    def add(
        self,
        conversation: int,
        parent: int | None,
        role: Role,
        content: str,
        *,
        thinking: str = "",
        attachments: Sequence[Attachment] = (),
        model: str = "",
    ) -> Message:
        """Add a message below `parent` (None: as a first one); it becomes the leaf."""
        if role not in get_args(Role):
            raise StoreError(f"role {role!r} is unknown; a message is by the user or assistant")
        now = time.time()
        attached = tuple(attachments)
        new = Message(
            0, conversation, parent, role, content, thinking, 0.0, attached, "", model, {}, now
        )
        with self._database.writing() as connection:
            _conversation(connection, conversation)
            _check_member(connection, conversation, parent)
            new = replace(new, id=rows.insert_message(connection, new))
            _point(connection, conversation, new.id)
            connection.execute(
                "UPDATE conversations SET updated = ? WHERE id = ?", (now, conversation)
            )
        return new

    def update(
        self,
        message: int,
        *,
        content: str | None = None,
        thinking: str | None = None,
        thinking_seconds: float | None = None,
        finish: str | None = None,
        stats: Mapping[str, float] | None = None,
    ) -> None:
        """Replace what is given, whole, of the message with this id.

        A message of a deleted conversation can still be written, so that undo brings all of it.
        """
        figures = None if stats is None else rows.to_text(stats, "the figures of a reply")
        with self._database.writing() as connection:
            cursor = connection.execute(
                "UPDATE messages SET content = coalesce(?, content), "
                "thinking = coalesce(?, thinking), "
                "thinking_seconds = coalesce(?, thinking_seconds), "
                "finish = coalesce(?, finish), stats = coalesce(?, stats) WHERE id = ?",
                (content, thinking, thinking_seconds, finish, figures, message),
            )
            if not cursor.rowcount:
                raise _message_gone(message)

    def branch(self, conversation: int) -> list[Message]:
        """The current branch, from its first message to the leaf."""
        with self._database.reading() as connection:
            return rows.branch_to(connection, _conversation(connection, conversation).leaf)

    def tree(self, conversation: int) -> tuple[Conversation, list[Message]]:
        """The conversation with the messages of every branch, parents before their children."""
        with self._database.reading() as connection:
            found = _conversation(connection, conversation)
            return found, rows.all_messages(connection, conversation)

    def siblings(self, message_id: int) -> list[int]:
        """Ids of the messages with the same parent, this one included, oldest first."""
        with self._database.reading() as connection:
            conversation, parent = _place(connection, message_id)
            query = "SELECT id FROM messages WHERE conversation = ? AND parent IS ? ORDER BY id"
            return [number for (number,) in connection.execute(query, (conversation, parent))]

    def select(self, message_id: int) -> list[Message]:
        """Switch to the branch through this message, down to its newest descendant; return it."""
        with self._database.writing() as connection:
            conversation, _ = _place(connection, message_id)
            _conversation(connection, conversation)
            leaf = rows.newest_descendant(connection, conversation, message_id)
            _point(connection, conversation, leaf)
            return rows.branch_to(connection, leaf)

    def set_leaf(self, conversation: int, message_id: int | None) -> None:
        """Let the current branch end at this message; None: before the first one."""
        with self._database.writing() as connection:
            _conversation(connection, conversation)
            _check_member(connection, conversation, message_id)
            _point(connection, conversation, message_id)

    def questions(self, most: int) -> list[str]:
        """The last `most` texts that the user sent, each once, the newest last."""
        query = (
            "SELECT content FROM messages JOIN conversations ON conversations.id = conversation "
            "WHERE role = 'user' AND content <> '' AND deleted IS NULL "
            "GROUP BY content ORDER BY max(messages.id) DESC LIMIT ?"
        )
        with self._database.reading() as connection:
            return [text for (text,) in connection.execute(query, (most,))][::-1]

    # Settings that are not of one chat

    def settings(self, scope: str) -> dict[str, Any]:
        """The saved settings of all models (`scope` "") or of the model of that name."""
        with self._database.reading() as connection:
            query = "SELECT data FROM settings WHERE scope = ?"
            row = connection.execute(query, (scope,)).fetchone()
        return rows.from_text(row[0], f"the settings of {scope or 'all models'}") if row else {}

    def save_settings(self, scope: str, values: Mapping[str, Any]) -> None:
        """Replace the settings of `scope` by these, which must be JSON values."""
        text = rows.to_text(values, f"the settings of {scope or 'all models'}")
        with self._database.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (scope, text))

    def _change(self, number: int, query: str, value: object) -> None:
        with self._database.writing() as connection:
            _conversation(connection, number)
            connection.execute(query, (value, number))


def _insert_conversation(connection: sqlite3.Connection, new: Conversation) -> int:
    settings = rows.to_text(new.settings, "the settings of a chat")
    cursor = connection.execute(
        "INSERT INTO conversations (title, model, settings, created, updated) "
        "VALUES (?, ?, ?, ?, ?)",
        (new.title, new.model, settings, new.created, new.updated),
    )
    return int(cursor.lastrowid or 0)


def _conversation(connection: sqlite3.Connection, number: int) -> Conversation:
    row = connection.execute(_CONVERSATIONS + "AND id = ?", (number,)).fetchone()
    if row is None:
        raise _gone(number)
    return rows.conversation_from(row)


def _place(connection: sqlite3.Connection, message: int) -> tuple[int, int | None]:
    """The message's conversation and parent."""
    query = "SELECT conversation, parent FROM messages WHERE id = ?"
    row: tuple[int, int | None] | None = connection.execute(query, (message,)).fetchone()
    if row is None:
        raise _message_gone(message)
    return row


def _check_member(connection: sqlite3.Connection, conversation: int, message: int | None) -> None:
    if message is not None and _place(connection, message)[0] != conversation:
        raise StoreError(f"message {message} is not of conversation {conversation}")


def _point(connection: sqlite3.Connection, conversation: int, leaf: int | None) -> None:
    connection.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (leaf, conversation))


def _gone(conversation: int) -> StoreError:
    return StoreError(
        f"conversation {conversation} is gone: it was deleted, maybe in another window"
    )


def _message_gone(message: int) -> StoreError:
    return StoreError(f"message {message} is gone: its conversation was deleted for good")

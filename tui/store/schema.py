"""The tables, as an ordered list of migrations: number n leads from version n to n + 1.

What was released never changes; a new version is a new entry at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui.store.error import StoreError
from tui.store.transaction import transaction

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

APPLICATION_ID = 0x6C64_6373  # "ldcs": tells our files from other programs'

# Messages form trees. A parent is of the same conversation (the two-column key) and older than
# its children (the check), so there are no cycles, and the order of ids is the order of a branch.
# `content` stands before `thinking`, so that a search need not read past the latter.
_TREES = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    """CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL,
        model TEXT NOT NULL,
        settings TEXT NOT NULL,
        leaf INTEGER,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        deleted REAL,
        FOREIGN KEY (id, leaf) REFERENCES messages (conversation, id)
    )""",
    """CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        parent INTEGER CHECK (parent < id),
        role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
        created REAL NOT NULL,
        model TEXT NOT NULL,
        finish TEXT NOT NULL,
        stats TEXT NOT NULL,
        thinking_seconds REAL NOT NULL,
        content TEXT NOT NULL,
        thinking TEXT NOT NULL,
        UNIQUE (conversation, id),
        FOREIGN KEY (conversation, parent) REFERENCES messages (conversation, id)
    )""",
    "CREATE INDEX messages_by_parent ON messages (conversation, parent)",
    "CREATE TABLE settings (scope TEXT PRIMARY KEY, data TEXT NOT NULL)",
)
_ATTACHMENTS = (
    """CREATE TABLE attachments (
        id INTEGER PRIMARY KEY,
        message INTEGER NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        text TEXT NOT NULL
    )""",
    "CREATE INDEX attachments_by_message ON attachments (message)",
)

MIGRATIONS = (_TREES, _ATTACHMENTS)


def check(connection: sqlite3.Connection, path: Path) -> int:
    """Version of the file; 0 for a new one.

    Raises `StoreError` for a file of another program or of a newer localds.
    """
    # One statement, so that a migration by another app lies before or after, never between.
    version, application, tables = connection.execute(
        "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master) "
        "FROM pragma_user_version, pragma_application_id"
    ).fetchone()
    if tables and application != APPLICATION_ID:
        raise StoreError(
            f"chats in {path}: this is another program's database; move it away "
            f"(mv {path} {path}.old) and start again with an empty one"
        )
    if version > len(MIGRATIONS):
        raise StoreError(
            f"chats in {path}: the file has version {version}, written by a newer localds; this "
            f"one knows versions up to {len(MIGRATIONS)}: update it (pip install -U localds)"
        )
    return int(version)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the file to the newest version, one transaction a step. Raises as `check` does."""
    while (version := check(connection, path)) < len(MIGRATIONS):
        with transaction(connection, "IMMEDIATE"):
            # Another app may have done this step while this one waited for the lock.
            if check(connection, path) == version:
                for statement in MIGRATIONS[version]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")

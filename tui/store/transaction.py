"""All or nothing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator


@contextmanager
def transaction(
    connection: sqlite3.Connection, kind: Literal["DEFERRED", "IMMEDIATE"]
) -> Iterator[sqlite3.Connection]:
    """Commit what the block did, or undo all of it if it raises.

    IMMEDIATE waits for other writers at the start, so that what is read stays true until the
    commit; DEFERRED, for reading, sees the file as it is at the first statement.
    """
    connection.execute(f"BEGIN {kind}")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        # After some errors, a full disk among them, SQLite has already undone it.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise

"""One SQLite file: how it is opened, and how several threads and apps share it."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

from tui.store.error import StoreError, explained
from tui.store.schema import check, migrate
from tui.store.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BUSY_SECONDS = 5.0


class Database:
    """The file at `path`, made where there is none, in the newest version of the tables.

    All threads share one connection under one lock: with a connection each, the changes of one's
    own worker would look like those of another app. Raises `StoreError`, as all methods do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._open = True
        with explained(path):
            _make(path)
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(self._connection, path)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        with self._lock, explained(self._path):
            self._open = False
            self._connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The file as it is at one moment."""
        with self._transaction("DEFERRED") as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is written, or nothing."""
        with self._transaction("IMMEDIATE") as connection:
            yield connection

    def change_counter(self) -> int:
        """A number that changes when another app has written."""
        with self._locked() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def _transaction(self, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[sqlite3.Connection]:
        with self._locked() as connection, transaction(connection, kind):
            yield connection

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        with self._lock, explained(self._path):
            if not self._open:
                raise StoreError(f"chats in {self._path}: they were closed; open them again")
            yield self._connection


def _make(path: Path) -> None:
    """Make the folder and the file, for the user's eyes only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # An existing file is not opened here: closing it would drop the locks that SQLite holds on it.
    with suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    # Another program's file is left as it is, so look before the journal's mode is changed.
    check(connection, path)
    _use_write_ahead_log(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    # What the user deletes must not stay readable in the file's free pages.
    connection.execute("PRAGMA secure_delete = ON")
    connection.create_function(
        "contains", 2, lambda text, folded: folded in text.casefold(), deterministic=True
    )
    migrate(connection, path)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch to WAL, where one app can read while another writes."""
    # SQLite does not wait here when another app switches the same file at the same time.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return

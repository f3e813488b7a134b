"""What can go wrong with the chats' file, said so that a user can mend it."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MOVE_AWAY = "move it away (mv {path} {path}.old) and start again with an empty one"
_DAMAGED = f"the database is damaged; {_MOVE_AWAY}"
_REMEDIES = {
    sqlite3.SQLITE_FULL: "the disk is full; make room, the last change was not saved",
    sqlite3.SQLITE_READONLY: "it cannot be written; mend the permissions of file and folder",
    sqlite3.SQLITE_PERM: "it cannot be opened; mend the permissions of file and folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; it must be a file in a folder open to you",
    sqlite3.SQLITE_BUSY: "another program keeps it locked; close that program and try again",
    sqlite3.SQLITE_IOERR: "the disk cannot be read or written; check it, and that it has room",
    sqlite3.SQLITE_NOTADB: f"this is no database of chats; {_MOVE_AWAY}",
}


class StoreError(ValueError):
    """The chats cannot be read or written as asked; the message says why and what to do."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and the file system into `StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        # The low byte is the kind of error; the rest details it. Damage has many kinds.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        remedy = _REMEDIES.get(code, _DAMAGED).format(path=path)
        raise StoreError(f"chats in {path}: {error}: {remedy}") from error
    except OSError as error:
        raise StoreError(
            f"chats in {path}: {error.strerror or error}; mend that, or set XDG_STATE_HOME "
            "to a folder that you may write"
        ) from error
    except UnicodeDecodeError as error:
        raise StoreError(f"chats in {path}: {error}: {_DAMAGED.format(path=path)}") from error
    except UnicodeEncodeError as error:
        raise StoreError(
            f"chats in {path}: a text holds {error.object[error.start]!r}, half of a character, "
            "which cannot be saved; remove it"
        ) from error

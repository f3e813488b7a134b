"""The file of the chats: older and newer versions, damage, full disks and locks."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chat_stores import chain, change, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tui.store import Attachment, Conversation, ConversationStore, Message, StoreError, to_json
from tui.store.schema import MIGRATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "chats.db"


@pytest.fixture
def store(path: Path) -> Iterator[ConversationStore]:
    with ConversationStore(path) as opened:
        yield opened


def test_the_file_is_private_and_in_the_state_folder(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        with ConversationStore() as store:
            store.create()
            path = tmp_path / "state" / "localds" / "chats.db"
            files = sorted(path.parent.iterdir())
            assert files[0] == path
            assert len(files) == 3
            assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
            assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_closed_store_says_so(store: ConversationStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="they were closed"):
        store.conversations()


OLD_ROWS = (
    "INSERT INTO conversations VALUES (3, 'Old', 'm', '{\"seed\": 1}', NULL, 5.0, 6.0, NULL)",
    "INSERT INTO conversations VALUES (4, 'Gone', 'm', '{}', NULL, 5.0, 6.0, 7.0)",
    "INSERT INTO messages VALUES (8, 3, NULL, 'user', 1.0, '', '', '{}', 0, 'Hello', '')",
    "INSERT INTO messages VALUES (9, 3, 8, 'assistant', 2.0, 'm', 'stop', '{\"n\": 2}', 1.5,"
    " 'World', 'hm')",
    "UPDATE conversations SET leaf = 9 WHERE id = 3",
    "INSERT INTO settings VALUES ('', '{\"theme\": \"nord\"}')",
)


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_every_older_version_opens_and_keeps_everything(tmp_path: Path, version: int) -> None:
    path = tmp_path / "chats.db"
    with closing(sqlite3.connect(path)) as connection:
        for migration in MIGRATIONS[:version]:
            for statement in migration:
                connection.execute(statement)
        for statement in OLD_ROWS:
            connection.execute(statement)
        if version >= 2:
            connection.execute("INSERT INTO attachments VALUES (1, 8, 'a.txt', 4, 'text')")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.commit()
    attached = (Attachment("a.txt", "text", 4),) if version >= 2 else ()
    with ConversationStore(path) as store:
        conversation = Conversation(3, "Old", "m", {"seed": 1}, 9, 5.0, 6.0)
        messages = [
            Message(8, 3, None, "user", "Hello", "", 0, attached, "", "", {}, 1.0),
            Message(9, 3, 8, "assistant", "World", "hm", 1.5, (), "stop", "m", {"n": 2}, 2.0),
        ]
        assert store.conversations() == [conversation]
        assert store.branch(3) == messages
        assert store.settings("") == {"theme": "nord"}
        store.undelete(4)
        assert store.conversation(4).title == "Gone"
        new = store.add(3, 9, "user", "more", attachments=[Attachment("b", "c", 1)])
        assert store.branch(3) == [*messages, new]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_migration_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chats.db"
    with ConversationStore(path) as store:
        store.create("kept")
    broken = (*MIGRATIONS, ("CREATE TABLE extra (id)", "INSERT INTO nowhere VALUES (1)"))
    before = rows(path)
    with monkeypatch.context() as patch:
        patch.setattr("tui.store.schema.MIGRATIONS", broken)
        with pytest.raises(StoreError, match="no such table: nowhere"):
            ConversationStore(path)
    assert rows(path) == before
    with ConversationStore(path) as store:
        assert [c.title for c in store.conversations()] == ["kept"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT * FROM sqlite_master WHERE name='extra'").fetchall() == []


def test_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    ConversationStore(path).close()
    change(path, "PRAGMA user_version = 99")
    content = path.read_bytes()
    with pytest.raises(StoreError, match=r"version 99, written by a newer localds.*update it"):
        ConversationStore(path)
    assert path.read_bytes() == content


def test_what_is_no_database_of_chats_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("my diary " * 1000)
    change(other, "CREATE TABLE recipes (name)")
    for file in (text, other):
        content = file.read_bytes()
        with pytest.raises(StoreError, match=f"mv {file} {file}.old") as error:
            ConversationStore(file)
        assert str(error.value).startswith(f"chats in {file}: ")
        assert file.read_bytes() == content
    (tmp_path / "folder.db").mkdir()
    for file in (tmp_path / "folder.db", text / "chats.db"):
        with pytest.raises(StoreError, match=f"chats in {file}"):
            ConversationStore(file)


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    path.touch()
    with ConversationStore(path) as store:
        store.create()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damage_is_told_never_raised_as_something_else(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "chats.db"
    path.unlink(missing_ok=True)
    with ConversationStore(path) as store:
        chain(store, 20)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path.write_bytes(content)
    try:
        with ConversationStore(path) as store:
            for conversation in store.conversations():
                store.branch(conversation.id)
            store.create()
    except StoreError:
        pass


def test_a_cycle_or_a_gap_made_by_damage_hangs_nothing(
    store: ConversationStore, path: Path
) -> None:
    conversation, messages = chain(store, 5)
    ids = [message.id for message in messages]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE messages SET parent = ? WHERE id = ?", (ids[3], ids[1]))
    assert [m.id for m in store.branch(conversation.id)] == ids[1:]
    assert [m.id for m in store.select(ids[2])] == ids[1:]
    change(path, "UPDATE messages SET parent = 0 WHERE id = ?", ids[1])
    assert [m.id for m in store.branch(conversation.id)] == ids[1:]
    with pytest.raises(StoreError, match="its message 0 is missing; the database is damaged"):
        to_json(store, conversation.id)


@pytest.mark.parametrize(
    ("pragma", "message"),
    [
        ("max_page_count = 1", "the disk is full; make room, the last change was not saved"),
        ("query_only = ON", "it cannot be written; mend the permissions"),
    ],
)
def test_a_full_or_read_only_disk_is_told_and_nothing_is_lost(
    store: ConversationStore, path: Path, pragma: str, message: str
) -> None:
    conversation, messages = chain(store, 4)
    before = rows(path)
    # Both stand in for the disk: SQLite reports them as it does the real thing.
    connection = store._database._connection
    connection.execute(f"PRAGMA {pragma}")
    with pytest.raises(StoreError, match=message):
        store.update(messages[-1].id, content="long " * 100_000)
    assert store.branch(conversation.id) == messages
    assert rows(path) == before
    connection.execute("PRAGMA max_page_count = 1000000")
    connection.execute("PRAGMA query_only = OFF")
    store.update(messages[-1].id, content="better")
    assert store.branch(conversation.id)[-1].content == "better"


def test_a_lock_that_stays_is_told(store: ConversationStore, path: Path) -> None:
    store._database._connection.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another program keeps it locked"):
            store.create()
        assert store.conversations() == []
    store.create()

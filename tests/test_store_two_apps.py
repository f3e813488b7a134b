"""Two apps on one file of chats, and apps that are killed: real processes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tui.store import ConversationStore
from tui.store.schema import MIGRATIONS

if TYPE_CHECKING:
    from pathlib import Path

WRITE = """
import sys
from pathlib import Path
from tui.store import Attachment, ConversationStore

path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
with ConversationStore(path) as store:
    own = store.create(name)
    parent = None
    for i in range(count):
        text = f"{name} {i}"
        file = Attachment(text, text, i)
        parent = store.add(own.id, parent, "user", text, attachments=[file]).id
        store.update(parent, content=text + "!", finish="stop")
        store.add(1, None, "user", text)
"""
OPEN = """
import sys
from pathlib import Path
from tui.store import ConversationStore

print("ready", flush=True)
sys.stdin.readline()
with ConversationStore(Path(sys.argv[1])) as store:
    store.create("opened")
"""
UPDATE = """
import sys, time
from pathlib import Path
from tui.store import ConversationStore

with ConversationStore(Path(sys.argv[1])) as store:
    chat = store.create("reply").id
    question = store.add(chat, None, "user", "Why?")
    reply = store.add(chat, question.id, "assistant", "")
    words = []
    while True:
        words.append(f"word{len(words)}")
        store.update(reply.id, content=" ".join(words), thinking=" ".join(words))
        print(len(words), flush=True)
        time.sleep(0.01)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_together(processes: list[subprocess.Popen[str]]) -> None:
    """Let all go on at the same moment, once all are ready; none may fail."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [(output[1], code) for output, code in results] == [("", 0)] * len(processes)


def check_sound(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_apps_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path, count = tmp_path / "chats.db", 150
    with ConversationStore(path) as store:
        shared = store.create("shared").id
    assert shared == 1
    run_together([start(WRITE, path, name, count) for name in "ab"])
    check_sound(path)
    with ConversationStore(path) as store:
        own = {c.title: c.id for c in store.conversations()}
        for name in "ab":
            branch = store.branch(own[name])
            assert [m.content for m in branch] == [f"{name} {i}!" for i in range(count)]
            assert {m.finish for m in branch} == {"stop"}
            files = [a for m in branch for a in m.attachments]
            assert [(a.text, a.tokens) for a in files] == [(f"{name} {i}", i) for i in range(count)]
        texts = [m.content for m in store.tree(shared)[1]]
        assert sorted(texts) == sorted(f"{name} {i}" for name in "ab" for i in range(count))
        for name in "ab":
            mine = [text for text in texts if text.startswith(name)]
            assert mine == [f"{name} {i}" for i in range(count)]


@pytest.mark.parametrize("updates", [1, 40, 120])
def test_a_killed_app_leaves_its_last_words(tmp_path: Path, updates: int) -> None:
    path = tmp_path / "chats.db"
    process = start(UPDATE, path)
    assert process.stdout is not None
    done = 0
    while done < updates:
        done = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.communicate(timeout=60)[0].split()]
    assert process.returncode == -signal.SIGKILL
    last = max([done, *said])
    with ConversationStore(path) as store:
        (conversation,) = store.conversations()
        question, reply = store.branch(conversation.id)
        assert question.content == "Why?"
        assert reply.finish == ""
        words = reply.content.split()
        # What was reported is there; the kill may have come between a write and its report.
        assert len(words) in (last, last + 1)
        assert words == [f"word{i}" for i in range(len(words))]
        assert reply.thinking == reply.content
        store.update(reply.id, finish="stopped")
    check_sound(path)


def test_an_app_killed_while_another_looks_on(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with ConversationStore(path) as store:
        process = start(UPDATE, path)
        assert process.stdout is not None
        process.stdout.readline()
        counter = store.change_counter()
        process.stdout.readline()
        process.stdout.readline()
        assert store.change_counter() != counter
        process.kill()
        process.communicate(timeout=60)
        (conversation,) = store.conversations()
        store.rename(conversation.id, "still here")
        assert store.branch(conversation.id)[-1].content.startswith("word0 word1")
    check_sound(path)


def make_old(path: Path, version: int) -> None:
    """A file of an older version, not in WAL mode, as a restored copy might be."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in (s for migration in MIGRATIONS[:version] for s in migration):
            connection.execute(statement)
        if version:
            connection.execute(
                "INSERT INTO conversations VALUES (1, 'old', 'm', '{}', NULL, 5.0, 6.0, NULL)"
            )
        connection.execute(f"PRAGMA user_version = {version}")
        connection.commit()


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
def test_apps_that_start_at_once_migrate_once(tmp_path: Path, version: int) -> None:
    path = tmp_path / "chats.db"
    if version:
        make_old(path, version)
    run_together([start(OPEN, path) for _ in range(4)])
    check_sound(path)
    with ConversationStore(path) as store:
        titles = sorted(c.title for c in store.conversations())
    assert titles == ["old"] * bool(version) + ["opened"] * 4


@pytest.mark.parametrize("lock", ["EXCLUSIVE", "IMMEDIATE"])
def test_starting_waits_for_another_app_that_migrates(tmp_path: Path, lock: str) -> None:
    path = tmp_path / "chats.db"
    make_old(path, 1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(f"BEGIN {lock}")
        process = start(OPEN, path)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(1)
        assert process.poll() is None
        for statement in MIGRATIONS[1]:
            other.execute(statement)
        other.execute("PRAGMA user_version = 2")
        other.execute("COMMIT")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    check_sound(path)

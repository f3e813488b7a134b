"""`localds chat` in a real terminal: the app opens, leaves the terminal as it was, and may die."""

from __future__ import annotations

import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import localds
from localds.catalog.resolve import DEMO
from tui.store.conversations import ConversationStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENTER_ALTERNATE, LEAVE_ALTERNATE = b"\x1b[?1049h", b"\x1b[?1049l"
READY = re.compile(rb"of \d+ tokens")  # in the status line once the model is loaded
BABBLE = ["--temperature", "9", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "3"]


class Terminal:
    """A program in a pseudo-terminal. `seen` is all that it wrote."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.parent, child = pty.openpty()
        os.set_blocking(self.parent, False)
        environment = os.environ | {
            "TERM": "xterm-256color",
            "COLUMNS": "100",
            "LINES": "30",
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "localds", "chat", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
            cwd=folder,
        )
        os.close(child)
        self.seen = b""

    def read(self, seconds: float = 0.1) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self.parent], [], [], left)[0]:
                try:
                    self.seen += os.read(self.parent, 65536)
                except OSError:  # the other end is closed
                    return

    def until(self, text: bytes | re.Pattern[bytes], seconds: float = 60) -> None:
        pattern = re.compile(re.escape(text)) if isinstance(text, bytes) else text
        end = time.monotonic() + seconds
        while not pattern.search(self.seen):
            assert time.monotonic() < end, self.seen[-3000:]
            assert self.process.poll() is None, self.seen[-3000:]
            self.read()

    def write(self, text: bytes) -> None:
        os.write(self.parent, text)

    def wait(self, seconds: float = 30) -> int:
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.seen[-3000:]
            self.read()
        self.read()
        return int(self.process.returncode)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.parent)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """Arguments for a model that never comes to an end."""
    with localds.load(DEMO) as model:
        (end,) = model.tokenizer.eos_ids
    data = bytearray(DEMO.read_bytes())
    key = b"deepseek2.context_length"
    at = data.index(key) + len(key)
    assert struct.unpack_from("<II", data, at) == (4, 2048)
    struct.pack_into("<II", data, at, 4, 100_000)
    path = tmp_path / "endless.gguf"
    path.write_bytes(data)
    return [str(path), "-c", "100000", *BABBLE, "--logit-bias", f"{end}=-1000"]


def open_chat(terminals: list[Terminal], folder: Path, *arguments: str) -> Terminal:
    terminals.append(Terminal(folder, *arguments))
    terminals[-1].until(READY)
    return terminals[-1]


def kept_reply(folder: Path) -> tuple[str, str]:
    """Content and finish of the only chat's last message."""
    path = folder / "state" / "localds" / "chats.db"
    if not path.exists():
        return "", ""
    with ConversationStore(path) as store:
        chats = store.conversations()
        message = store.branch(chats[0].id)[-1] if chats else None
    if message is None or message.role == "user":
        return "", ""
    return message.content, message.finish


def test_the_app_opens_answers_and_leaves_the_terminal(
    tmp_path: Path, terminals: list[Terminal]
) -> None:
    terminal = open_chat(terminals, tmp_path)
    assert ENTER_ALTERNATE in terminal.seen
    terminal.write(b"What is localds?\r")
    while kept_reply(tmp_path)[1] == "":
        terminal.read()
    terminal.write(b"\x11")  # Ctrl-Q
    assert terminal.wait() == 0
    assert terminal.seen.rfind(LEAVE_ALTERNATE) > terminal.seen.rfind(ENTER_ALTERNATE)
    assert b"Traceback" not in terminal.seen
    content, finish = kept_reply(tmp_path)
    assert content
    assert finish == "stop"


def test_plain_chat_is_line_by_line(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(tmp_path, "--plain"))
    terminal.until(b">>> ")
    assert ENTER_ALTERNATE not in terminal.seen
    terminal.write(b"/bye\r")
    assert terminal.wait() == 0


def test_an_unknown_model_is_told_without_an_app(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(tmp_path, "no-such-model"))
    assert terminal.wait() == 1
    assert b"no model has this name" in terminal.seen
    assert ENTER_ALTERNATE not in terminal.seen


def test_after_kill_9_at_most_two_seconds_of_a_reply_are_lost(
    tmp_path: Path, terminals: list[Terminal], endless: list[str]
) -> None:
    terminal = open_chat(terminals, tmp_path, *endless)
    terminal.write(b"Say anything\r")
    terminal.until(b"tokens/s")
    sizes: list[int] = []  # every tenth of a second
    while len(sizes) < 25:
        terminal.read(0.1)
        content, finish = kept_reply(tmp_path)
        assert finish == ""
        sizes.append(len(content))
    terminal.process.send_signal(signal.SIGKILL)
    terminal.wait()
    # It grew all the time, and was written at least once within any two seconds.
    assert all(after > before for before, after in zip(sizes, sizes[20:], strict=False))
    content, finish = kept_reply(tmp_path)
    assert len(content) >= sizes[-1]

    again = open_chat(terminals, tmp_path)
    again.write(b"/load Say anything\r")
    again.until(b"this reply was not finished")
    again.write(b"\x11")
    assert again.wait() == 0
    assert kept_reply(tmp_path) == (content, "")


def test_ctrl_c_stops_a_reply_and_not_the_app(
    tmp_path: Path, terminals: list[Terminal], endless: list[str]
) -> None:
    terminal = open_chat(terminals, tmp_path, *endless)
    terminal.write(b"Say anything\r")
    terminal.until(b"tokens/s")
    terminal.write(b"\x03")
    terminal.until(b"stopped;")
    assert terminal.process.poll() is None
    assert kept_reply(tmp_path)[1] == "stopped"


def test_two_apps_see_each_others_chats(tmp_path: Path, terminals: list[Terminal]) -> None:
    one = open_chat(terminals, tmp_path)
    two = open_chat(terminals, tmp_path)
    one.write(b"Which quants are there?\r")
    one.until(b"tokens/s")
    two.write(b"\x02")  # Ctrl-B
    two.until(b"Which quants")


def test_leaving_while_a_reply_meets_a_full_disk(
    tmp_path: Path, terminals: list[Terminal], endless: list[str]
) -> None:
    (tmp_path / "state" / "localds").mkdir(parents=True)
    with ConversationStore(tmp_path / "state" / "localds" / "chats.db"):
        pass
    terminal = open_chat(terminals, tmp_path, *endless)
    # As if the disk were full: no file grows beyond what the first messages need.
    resource.prlimit(terminal.process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    terminal.write(b"Say anything\r")
    terminal.until(b"tokens/s")
    terminal.read(3)
    terminal.write(b"\x11")
    assert terminal.wait() == 0
    assert b"Traceback" not in terminal.seen


def test_options_that_make_no_sense_are_told_without_an_app(
    tmp_path: Path, terminals: list[Terminal]
) -> None:
    for arguments, message in (
        (("--ram", "lots"), b"ram"),
        (("--cache-type", "f8"), b"choose f16 or q8_0 or f32"),
    ):
        terminals.append(terminal := Terminal(tmp_path, *arguments))
        assert terminal.wait() == 1
        assert message in terminal.seen
        assert ENTER_ALTERNATE not in terminal.seen

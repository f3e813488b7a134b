"""Attachments: which files are taken, how they are refused, and what the model gets."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tui.attachments import (
    LIMIT_BYTES,
    AttachmentError,
    compose_message,
    estimate_tokens,
    pasted_attachment,
    read_attachment,
)
from tui.store.records import Attachment


def words(text: str) -> int:
    return len(text.split())


def refusal(path: Path, limit_bytes: int = LIMIT_BYTES) -> str:
    with pytest.raises(AttachmentError) as raised:
        read_attachment(path, words, limit_bytes)
    assert isinstance(raised.value, ValueError)
    return str(raised.value)


def test_reads_utf8_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("grün und blau\n", encoding="utf-8")
    assert read_attachment(path, words) == Attachment("notes.txt", "grün und blau\n", 3)
    assert read_attachment(path, words, name="sub/notes.txt").name == "sub/notes.txt"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_do_not_become_text(tmp_path: Path, encoding: str) -> None:
    text = "\ufeffä b" if encoding.endswith(("le", "be")) else "ä b"
    path = tmp_path / "marked.txt"
    path.write_bytes(text.encode(encoding))
    assert read_attachment(path, words).text == "ä b"


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_attachment(tmp_path / "empty", words) == Attachment("empty", "", 0)


def test_missing_and_folder_and_unreadable(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.txt")
    assert "folder" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be read" in refusal(tmp_path / "file" / "below")
    if os.geteuid() != 0:
        (tmp_path / "file").chmod(0)
        assert "permission" in refusal(tmp_path / "file").lower()


@pytest.mark.timeout(20)
def test_devices_and_pipes_are_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "device or pipe" in refusal(tmp_path / "pipe")
    assert "device or pipe" in refusal(Path("/dev/zero"))
    (tmp_path / "link").symlink_to("/dev/zero")
    assert "device or pipe" in refusal(tmp_path / "link")


@pytest.mark.parametrize("content", [b"a\0b", b"\xff\xfe\0\0a\0\0\0", b"caf\xe9", b"\xff\xfea"])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert "no text" in refusal(path)


def test_size_limit_is_exact_and_told(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    path.write_bytes(b"a" * 2048)
    assert read_attachment(path, len, 2048).tokens == 2048
    path.write_bytes(b"a" * 2049)
    message = refusal(path, 2048)
    assert "2 KiB" in message
    assert "big.txt" in message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_files_that_hide_their_size_are_limited_too() -> None:
    assert Path("/proc/self/status").stat().st_size == 0
    assert "limit" in refusal(Path("/proc/self/status"), 16)


def test_error_names_hostile_names_safely(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a\nb\x1b[31m.txt")
    assert "\n" not in message
    assert "\x1b" not in message


def test_pasted_text_is_numbered() -> None:
    assert pasted_attachment("a b", 3, words) == Attachment("pasted text 3", "a b", 2)


def test_estimate_rounds_up_bytes_over_four() -> None:
    assert [estimate_tokens(text) for text in ("", "a", "abcd", "abcde", "ää ä")] == [0, 1, 1, 2, 2]


def test_message_without_attachments_is_the_text() -> None:
    assert compose_message("hello\n", ()) == "hello\n"


def test_message_puts_each_file_in_a_fence_before_the_text() -> None:
    files = (Attachment("a.py", "x = 1\n", 4), Attachment("b.txt", "no end", 2))
    assert compose_message("Compare @a.py", files) == (
        "a.py:\n```\nx = 1\n```\n\nb.txt:\n```\nno end\n```\n\nCompare @a.py"
    )
    assert compose_message("", files[:1]) == "a.py:\n```\nx = 1\n```"


@pytest.mark.parametrize("inside", ["```", "`````\n```", "a ```` b", "`"])
def test_fence_is_longer_than_any_run_inside(inside: str) -> None:
    message = compose_message("", (Attachment("n", inside, 1),))
    fence = message.splitlines()[1]
    assert set(fence) == {"`"}
    assert len(fence) >= 3
    assert not re.search(re.escape(fence), inside)
    assert message.endswith(f"\n{inside}\n{fence}")


def test_a_name_of_two_lines_cannot_break_the_message() -> None:
    message = compose_message("", (Attachment("a\n```\nb", "text", 1),))
    assert message.splitlines()[0] == "a\\n```\\nb:"

"""Rows on disk while processes are killed, run out of room, or use one folder at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rows import CAP, CONVERSATION, cache_of, empty, file_bytes, files, partial_files, wrong_rows

from localds.memory.kept_rows import KeptRows
from localds.memory.row_blocks import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = f"""
import os, random, resource, sys, time
sys.path.append({str(Path(__file__).parent)!r})
from pathlib import Path
from rows import *
from localds.memory import row_blocks
from localds.memory.kept_rows import KeepError, KeptRows
"""

SLOWLY = """
checksum_of = row_blocks.crc32
def slow(rows, checksum):
    time.sleep(0.01)
    return checksum_of(rows, checksum)
row_blocks.crc32 = slow
KeptRows(Path(sys.argv[1]), "a" * 64, CAP).keep(cache_of(CONVERSATION), CONVERSATION)
"""

SMALL_FILES = """
resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes(BLOCK) - 1,) * 2)
try:
    KeptRows(Path(sys.argv[1]), "a" * 64, CAP).keep(cache_of(CONVERSATION), CONVERSATION)
except KeepError as error:
    print(error)
"""

READ_ONLY = """
if os.geteuid() == 0:
    os.seteuid(65534)
kept = KeptRows(Path(sys.argv[1]), "a" * 64, CAP)
cache = empty()
print(kept.restore(cache, CONVERSATION), wrong_rows(cache, CONVERSATION), kept.trim())
other = [1] * BLOCK
try:
    kept.keep(cache_of(other), other)
except KeepError as error:
    print(error)
"""

AT_ONCE = """
kept = KeptRows(Path(sys.argv[1]), "a" * 64, int(sys.argv[2]))
chance = random.Random(int(sys.argv[3]))
bodies = [CONVERSATION[: 2 * BLOCK] + [mark] * (6 * BLOCK) for mark in range(5)]
end = time.monotonic() + 2
restored = 0
while time.monotonic() < end:
    ids = chance.choice(bodies)[: chance.randrange(9 * BLOCK)]
    cache = empty()
    restored += kept.restore(cache, ids)
    assert not wrong_rows(cache, ids)
    kept.keep(cache_of(ids), ids)
    if chance.random() < 0.2:
        kept.trim()
assert restored
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", HEADER + code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen[str]) -> str:
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0, text
    return text


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users get to; pytest's own are for their owner only."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_killed_while_writing(tmp_path: Path) -> None:
    process = start(SLOWLY, tmp_path)
    try:
        deadline = time.monotonic() + 60
        while len(files(tmp_path)) < 4 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    left = len(partial_files(tmp_path))
    finished = len(files(tmp_path)) - left
    assert left == 1
    assert 3 <= finished < len(CONVERSATION) // BLOCK
    kept, cache = KeptRows(tmp_path, "a" * 64, CAP), empty()
    assert kept.restore(cache, CONVERSATION) == finished * BLOCK
    assert not wrong_rows(cache, CONVERSATION)
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    assert kept.restore(cache, CONVERSATION) == len(CONVERSATION) - finished * BLOCK


def test_files_may_not_grow_so_large(tmp_path: Path) -> None:
    assert "File too large; make room there" in output(start(SMALL_FILES, tmp_path))
    assert not files(tmp_path)


def test_a_folder_that_may_only_be_read(open_folder: Path) -> None:
    kept = KeptRows(open_folder / "latents", "a" * 64, CAP)
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    before = {path: path.stat().st_mtime_ns for path in files(open_folder)}
    for path in before:
        path.chmod(0o444)
    folder = next(iter(before)).parent
    try:
        for path in (folder, folder.parent):
            path.chmod(0o555)
        printed = output(start(READ_ONLY, folder.parent))
    finally:
        folder.chmod(0o755)
        folder.parent.chmod(0o755)
    assert printed.startswith(f"{len(CONVERSATION)} [] 0\nkeeping 1 blocks of rows in")
    assert "Permission denied; make room there or check the folder's permissions" in printed
    assert {path: path.stat().st_mtime_ns for path in files(open_folder)} == before


def test_several_processes_at_once(tmp_path: Path) -> None:
    cap = 20 * file_bytes(BLOCK)
    for text in [output(p) for p in [start(AT_ONCE, tmp_path, cap, seed) for seed in range(3)]]:
        assert not text
    assert not partial_files(tmp_path)
    KeptRows(tmp_path, "a" * 64, cap).trim()
    assert 0 < sum(path.stat().st_size for path in files(tmp_path)) <= cap
    assert os.listdir(tmp_path) == ["a" * 16]  # noqa: PTH208

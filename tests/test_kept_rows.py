"""Rows on disk: what comes back is what was computed, and nothing else ever does."""

from __future__ import annotations

import hashlib
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rows import (
    CAP,
    CONVERSATION,
    cache_of,
    empty,
    file_bytes,
    files,
    partial_files,
    whole,
    wrong_rows,
)

from localds import __version__
from localds.memory import row_blocks
from localds.memory.kept_rows import DEFAULT_CAP, KeepError, KeptRows
from localds.memory.row_blocks import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.memory.latents import LatentCache

SIZE = file_bytes(BLOCK)
LENGTH = len(CONVERSATION)


@pytest.fixture
def kept(tmp_path: Path) -> KeptRows:
    return KeptRows(tmp_path / "latents", "a" * 64, CAP)


def restored(kept: KeptRows, ids: list[int]) -> int:
    """Tokens of `ids` that come back, with the rows that they must have."""
    cache = empty()
    count = kept.restore(cache, ids)
    assert cache.length == count
    assert not wrong_rows(cache, ids)
    return count


def test_all_rows_come_back(kept: KeptRows) -> None:
    ids = CONVERSATION
    assert kept.keep(cache_of(ids), ids) == file_bytes(LENGTH)
    assert restored(kept, ids) == restored(kept, ids + ids) == LENGTH > whole(LENGTH)
    assert restored(kept, ids[:-1]) == whole(LENGTH)
    assert restored(kept, ids[: 3 * BLOCK]) == 3 * BLOCK
    assert restored(kept, ids[: 3 * BLOCK - 1]) == 2 * BLOCK
    assert restored(kept, ids[: BLOCK - 1]) == restored(kept, []) == 0


def test_only_new_blocks_are_written(kept: KeptRows, tmp_path: Path) -> None:
    ids = CONVERSATION
    assert kept.keep(cache_of(ids[: 2 * BLOCK]), ids[: 2 * BLOCK]) == 2 * SIZE
    assert kept.keep(cache_of(ids), ids[: 3 * BLOCK + 5]) == SIZE + file_bytes(5)
    assert kept.keep(cache_of(ids), ids[: 3 * BLOCK + 5]) == 0
    branch = ids[:BLOCK] + [1] * BLOCK
    assert kept.keep(cache_of(branch), branch) == SIZE
    assert sum(path.stat().st_size for path in files(tmp_path)) == 4 * SIZE + file_bytes(5)


def test_the_longest_short_block_comes_back_and_nothing_after_it(kept: KeptRows) -> None:
    ids = CONVERSATION
    cache = cache_of(ids)
    for length in (2 * BLOCK + 5, 2 * BLOCK + 20, 2 * BLOCK + 11):
        kept.keep(cache, ids[:length])
    assert restored(kept, ids) == restored(kept, ids[: 2 * BLOCK + 20]) == 2 * BLOCK + 20
    assert restored(kept, ids[: 2 * BLOCK + 19]) == 2 * BLOCK + 11
    assert restored(kept, ids[: 2 * BLOCK + 4]) == 2 * BLOCK
    kept.keep(cache, ids)
    assert restored(kept, ids) == LENGTH
    blocks(kept, cache, ids)[2].unlink()
    assert restored(kept, ids) == 2 * BLOCK + 20


@pytest.mark.parametrize("changed", [0, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
def test_a_changed_token_ends_what_comes_back(kept: KeptRows, changed: int) -> None:
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    ids = CONVERSATION.copy()
    ids[changed] += 1
    assert restored(kept, ids) == whole(changed)


def test_rows_of_another_model_or_layout_do_not_come_back(kept: KeptRows, tmp_path: Path) -> None:
    ids = CONVERSATION
    kept.keep(cache_of(ids), ids)
    # The same first 16 digits name the folder; still the models differ.
    assert restored(KeptRows(tmp_path / "latents", "a" * 63 + "b", CAP), ids) == 0
    assert restored(KeptRows(tmp_path / "latents", "b" * 64, CAP), ids) == 0
    # Rows of the same size in all.
    for other in (empty(layers=6, width=16), empty(layers=3, width=16, cache_type="f32")):
        assert len(other.layers) * other.row_bytes == 3 * 64
        assert kept.restore(other, ids) == 0
    assert restored(kept, ids) == LENGTH


def test_another_release_computes_its_own(kept: KeptRows, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    monkeypatch.setattr("localds.memory.kept_rows.__version__", "99.0")
    assert restored(kept, CONVERSATION) == 0


@pytest.mark.parametrize("held", [1, BLOCK, 2 * BLOCK + 9, 10 * BLOCK, 10 * BLOCK + 5])
def test_rows_in_the_cache_stay_as_they_are(kept: KeptRows, held: int) -> None:
    ids = CONVERSATION
    kept.keep(cache_of(ids), ids)
    cache = empty()
    cache.extend(held)
    for rows in cache.rows(0, held):
        rows[:] = b"\7" * len(rows)
    assert kept.restore(cache, ids) == LENGTH - held
    assert all(set(rows) == {7} for rows in cache.rows(0, held))
    assert not wrong_rows(cache, ids, held)


def test_a_short_block_within_what_the_cache_holds_adds_nothing(kept: KeptRows) -> None:
    ids = CONVERSATION
    kept.keep(cache_of(ids), ids[: 2 * BLOCK + 5])
    for held in (2 * BLOCK + 5, 2 * BLOCK + 9):
        cache = cache_of(ids[:held])
        assert kept.restore(cache, ids) == 0
        assert cache.length == held
    assert restored(kept, ids) == 2 * BLOCK + 5


def test_a_longer_cache_than_the_tokens_is_left_alone(kept: KeptRows) -> None:
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    cache = cache_of(CONVERSATION)
    assert kept.restore(cache, CONVERSATION[:BLOCK]) == 0
    assert cache.length == len(CONVERSATION)


def test_a_small_context_takes_what_fits(kept: KeptRows) -> None:
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    cache = empty(capacity=2 * BLOCK + 3)
    assert kept.restore(cache, CONVERSATION) == 2 * BLOCK
    assert restored(kept, CONVERSATION) == LENGTH


def flip(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    return change


def cut(path: Path) -> None:
    os.truncate(path, SIZE - 1)


def zeros(path: Path) -> None:
    """As after a power failure: the size is there, the data is not."""
    path.write_bytes(bytes(SIZE))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another_block(path: Path) -> None:
    other = next(file for file in path.parent.iterdir() if file != path)
    path.write_bytes(other.read_bytes())


DAMAGE = {
    "magic": flip(0),
    "key": flip(20),
    "first row": flip(48),
    "a row": flip(SIZE // 2),
    "last row": flip(SIZE - 5),
    "checksum": flip(SIZE - 1),
    "cut": cut,
    "empty": lambda path: os.truncate(path, 0),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": zeros,
    "folder": folder,
    "pipe": pipe,
    "another block": another_block,
    "gone": Path.unlink,
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def blocks(kept: KeptRows, cache: LatentCache, ids: list[int]) -> list[Path]:
    return [block.path for block in kept._blocks(cache, ids)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_is_absent_and_can_be_kept_again(kept: KeptRows, damage: str) -> None:
    cache = cache_of(CONVERSATION)
    kept.keep(cache, CONVERSATION)
    path = blocks(kept, cache, CONVERSATION)[2]
    DAMAGE[damage](path)  # type: ignore[operator]
    assert restored(kept, CONVERSATION) == 2 * BLOCK
    assert not os.path.lexists(path)
    assert kept.keep(cache, CONVERSATION) == SIZE
    assert restored(kept, CONVERSATION) == LENGTH


def test_the_cap_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    first, second, third = ([mark] * (4 * BLOCK) for mark in (1, 2, 3))
    other_model = KeptRows(tmp_path, "b" * 64, 10 * SIZE)
    kept = KeptRows(tmp_path, "a" * 64, 10 * SIZE)
    for store, ids in ((other_model, first), (kept, second)):
        assert store.keep(cache_of(ids), ids) == 4 * SIZE
    assert restored(other_model, first) == 4 * BLOCK  # now `second` was used least recently
    kept.keep(cache_of(third), third)
    assert len(files(tmp_path)) == 10
    # The end of a conversation goes before its beginning.
    assert restored(kept, second) == 2 * BLOCK
    assert restored(other_model, first) == restored(kept, third) == 4 * BLOCK
    assert KeptRows(tmp_path, "c" * 64, 3 * SIZE).trim() == 7 * SIZE
    assert restored(kept, third) == 3 * BLOCK


def test_keeping_again_counts_as_use(tmp_path: Path) -> None:
    first, second, third = ([mark] * (2 * BLOCK) for mark in (1, 2, 3))
    kept = KeptRows(tmp_path, "a" * 64, 4 * SIZE)
    for ids in (first, second, first, third):
        kept.keep(cache_of(ids), ids)
    assert restored(kept, second) == 0
    assert restored(kept, first) == restored(kept, third) == 2 * BLOCK


def test_what_is_larger_than_the_cap_is_kept_in_part(tmp_path: Path) -> None:
    kept = KeptRows(tmp_path, "a" * 64, 3 * SIZE - 1)
    assert kept.keep(cache_of(CONVERSATION), CONVERSATION) == 2 * SIZE
    assert restored(kept, CONVERSATION) == 2 * BLOCK
    nothing = KeptRows(tmp_path / "none", "a" * 64, 0)
    assert nothing.keep(cache_of(CONVERSATION), CONVERSATION) == 0
    assert not (tmp_path / "none").exists()


def test_trim_leaves_what_is_being_written_until_it_is_abandoned(tmp_path: Path) -> None:
    kept = KeptRows(tmp_path, "a" * 64, 2 * SIZE)
    kept.keep(cache_of(CONVERSATION), CONVERSATION[: 2 * BLOCK])
    partial = files(tmp_path)[0].parent / ".written"
    partial.write_bytes(bytes(100))
    assert kept.trim() == SIZE
    assert partial.exists()
    hours_ago = time.time() - 2 * 3600
    os.utime(partial, (hours_ago, hours_ago))
    assert kept.trim() == 100
    assert len(files(tmp_path)) == 1


def test_rows_are_for_their_owner_only(kept: KeptRows, tmp_path: Path) -> None:
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    assert (tmp_path / "latents").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in files(tmp_path)} == {0}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = KeptRows(tmp_path / "file" / "latents", "a" * 64, CAP)
    with pytest.raises(KeepError, match=r"keeping 11 blocks of rows in .*: Not a directory; make"):
        kept.keep(cache_of(CONVERSATION), CONVERSATION)
    assert restored(kept, CONVERSATION) == 0
    assert kept.trim() == 0


def test_a_disk_that_fills_up(
    kept: KeptRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block's third layer does not fit any more."""
    written = []

    def fill(rows: memoryview, checksum: int) -> int:
        written.append(rows)
        if len(written) == len(cache.layers) + 3:
            raise OSError(28, "No space left on device")
        return checksum_of(rows, checksum)

    checksum_of = row_blocks.crc32
    cache = cache_of(CONVERSATION)
    with monkeypatch.context() as patch:
        patch.setattr(row_blocks, "crc32", fill)
        with pytest.raises(KeepError, match="No space left on device; make room there"):
            kept.keep(cache, CONVERSATION)
    assert not partial_files(tmp_path)
    assert restored(kept, CONVERSATION) == BLOCK
    kept.keep(cache, CONVERSATION)
    assert restored(kept, CONVERSATION) == LENGTH


def test_reading_holds_no_copy(kept: KeptRows) -> None:
    kept.keep(cache_of(CONVERSATION), CONVERSATION)
    cache: LatentCache = empty()
    tracemalloc.start()
    kept.restore(cache, CONVERSATION)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cache.length == LENGTH
    # A few kilobytes of paths and threads for each block.
    assert peak < 2 * SIZE + 8192 * len(CONVERSATION) // BLOCK


def test_arguments_are_checked(kept: KeptRows, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cap_bytes is -1"):
        KeptRows(tmp_path, "a" * 64, -1)
    with pytest.raises(ValueError, match="cannot keep 5 tokens of a cache that holds 4"):
        kept.keep(cache_of([1, 2, 3, 4]), [1, 2, 3, 4, 5])


def test_the_default_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((10**12, DEFAULT_CAP), (10**9, 10**8)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert KeptRows(tmp_path / "not" / "there", "a" * 64).cap_bytes == expected


def test_a_file_is_what_the_format_says(kept: KeptRows, tmp_path: Path) -> None:
    ids = CONVERSATION[: 2 * BLOCK]
    cache = cache_of(ids)
    kept.keep(cache, list(np.array(ids, np.int64)))
    key = hashlib.sha256(f"{__version__} {'a' * 64} F16 3 x 32".encode()).digest()
    for start in (0, BLOCK):
        part = ids[start : start + BLOCK]
        key = hashlib.sha256(key + struct.pack(f"<{BLOCK}i", *part)).digest()
        rows = b"".join(layer.data[start : start + BLOCK].tobytes() for layer in cache.layers)
        path = tmp_path / "latents" / ("a" * 16) / key.hex()
        expected = b"localds rows\0\0\0\1" + key + rows + struct.pack("<I", zlib.crc32(rows))
        assert path.read_bytes() == expected

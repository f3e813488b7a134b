"""Importance matrices of both forms, as `localds convert` reads them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from convert import CheckpointError
from convert.imatrix import read_importance
from convert.source import Target
from localds.gguf.write import write_gguf

EXPERTS, COLUMNS = 3, 4
SUMS = np.arange(12, dtype=np.float32).reshape(EXPERTS, COLUMNS)
COUNTS = np.array([[2], [0], [4]], np.float32)
NAME = "blk.0.ffn_up_exps.weight"


def target(name: str, *shape: int) -> Target:
    def read(
        _matrix: int, start: int, stop: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return np.zeros((stop - start, shape[-1]), np.float32)

    return Target(name, shape, "BF16", 0, read)


def write_new(path: Path, sums: np.ndarray = SUMS, counts: np.ndarray = COUNTS) -> Path:
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": ["text"],
        "imatrix.chunk_count": 5,
        "imatrix.chunk_size": 512,
    }
    write_gguf(path, metadata, {f"{NAME}.in_sum2": sums, f"{NAME}.counts": counts})
    return path


def write_old(path: Path, calls: int = 5) -> Path:
    values = SUMS.ravel() * calls
    raw = struct.pack("<ii", 1, len(NAME)) + NAME.encode() + struct.pack("<ii", calls, len(values))
    path.write_bytes(raw + values.astype("<f4").tobytes() + struct.pack("<ii", 7, 4) + b"text")
    return path


def test_new_form(tmp_path: Path) -> None:
    importance = read_importance(write_new(tmp_path / "i.gguf"))
    found = importance.of(target(NAME, EXPERTS, 8, COLUMNS))
    assert found is not None
    np.testing.assert_allclose(found[0], SUMS[0] / 2)
    np.testing.assert_allclose(found[2], SUMS[2] / 4)
    # The expert that was never reached takes the mean of the others.
    np.testing.assert_allclose(found[1], (SUMS[0] / 2 + SUMS[2] / 4) / 2)
    assert importance.metadata["quantize.imatrix.chunks_count"] == 5
    assert (
        "1 experts were never reached" in importance.notes([target(NAME, EXPERTS, 8, COLUMNS)])[0]
    )


def test_old_form(tmp_path: Path) -> None:
    importance = read_importance(write_old(tmp_path / "i.dat"))
    found = importance.of(target(NAME, EXPERTS, 8, COLUMNS))
    assert found is not None
    np.testing.assert_allclose(found, SUMS)
    assert (importance.chunks, importance.datasets) == (7, ["text"])


def test_heads_share_one_count(tmp_path: Path) -> None:
    path = write_new(tmp_path / "i.gguf", SUMS.reshape(1, -1), np.array([[2]], np.float32))
    found = read_importance(path).of(target(NAME, EXPERTS, 8, COLUMNS))
    assert found is not None
    np.testing.assert_allclose(found, SUMS / 2)


def test_weights_without_entry_are_named(tmp_path: Path) -> None:
    importance = read_importance(write_new(tmp_path / "i.gguf"))
    other = target("blk.0.attn_q.weight", 8, COLUMNS)
    assert importance.of(other) is None
    assert "no entry for blk.0.attn_q.weight" in importance.notes([other])[0]
    with pytest.raises(CheckpointError, match="another model's"):
        importance.check([other])


def test_sizes_of_another_model(tmp_path: Path) -> None:
    importance = read_importance(write_new(tmp_path / "i.gguf"))
    with pytest.raises(CheckpointError, match="12 values in 3 rows, but the tensor has 3 matrices"):
        importance.of(target(NAME, EXPERTS, 8, COLUMNS + 1))


@pytest.mark.parametrize("cut", [0, 3, 5, 20, 45, 80])
def test_cut_short(tmp_path: Path, cut: int) -> None:
    whole = write_old(tmp_path / "i.dat").read_bytes()
    (tmp_path / "cut.dat").write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=r"make one with|no entries"):
        read_importance(tmp_path / "cut.dat")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_senseless_values(tmp_path: Path, value: float) -> None:
    sums = SUMS.copy()
    sums[2, 1] = value
    with pytest.raises(CheckpointError, match="negative or not finite"):
        read_importance(write_new(tmp_path / "i.gguf", sums))


def test_another_kind_of_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"general.type": "adapter"}, {"x": SUMS})
    with pytest.raises(CheckpointError, match="of type 'adapter', not an"):
        read_importance(tmp_path / "m.gguf")
    (tmp_path / "noise").write_bytes(np.random.default_rng(1).bytes(5000))
    with pytest.raises(CheckpointError, match="make one with"):
        read_importance(tmp_path / "noise")

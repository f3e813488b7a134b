"""Importance matrices: what `localds imatrix` and llama-imatrix write, in the new form and the old.

Both hold, for each weight, the mean squared input of every column; stacked experts (and heads) have
a row of them each. Facts: llama.cpp's tools/imatrix.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from convert.config import CheckpointError
from localds.gguf import GGUFError, GGUFFile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from convert.source import Target, Value

MAX_NAME_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight's importance.

    `means` are the mean squared inputs [n], of all matrices one after another; `counts` how many
    inputs each of its rows saw: one for a plain weight, one an expert for stacked ones.
    """

    means: NDArray[np.float32]
    counts: NDArray[np.float32]

    def matrices(self, count: int) -> NDArray[np.float32]:
        """Importance [count, columns]; matrices without inputs get the mean of the others.

        An expert that no text has reached is like its neighbours rather than like nothing.
        """
        rows = self.means.reshape(count, -1)
        reached = np.repeat(self.counts > 0, count // len(self.counts))
        if reached.all():
            return rows
        filled = rows.copy()
        filled[~reached] = rows[reached].mean(axis=0) if reached.any() else 1
        return filled

    @property
    def unreached(self) -> list[int]:
        """The rows that saw no input."""
        return [int(row) for row in np.flatnonzero(self.counts <= 0)]


@dataclass(frozen=True, slots=True)
class Importance:
    """An importance matrix: entries by the names of weights, and where it comes from."""

    path: Path
    entries: dict[str, Entry]
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0

    @property
    def metadata(self) -> dict[str, Value]:
        """The keys with which a quantized file names its importance matrix."""
        keys: dict[str, Value] = {
            "quantize.imatrix.file": str(self.path),
            "quantize.imatrix.entries_count": len(self.entries),
        }
        if self.datasets:
            keys["quantize.imatrix.dataset"] = self.datasets[0]
        if self.chunks > 0:
            keys["quantize.imatrix.chunks_count"] = self.chunks
        return keys

    def of(self, target: Target) -> NDArray[np.float32] | None:
        """Importance float32 [matrices, columns] of a tensor; None if there is no entry for it.

        Raises `CheckpointError` if the entry is for a tensor of another size.
        """
        entry = self.entries.get(target.name)
        if entry is None:
            return None
        expected = target.matrices * target.columns
        if len(entry.means) != expected or target.matrices % len(entry.counts):
            raise CheckpointError(
                f"{self.path}: the entry for {target.name} has {len(entry.means)} values in "
                f"{len(entry.counts)} rows, but the tensor has {target.matrices} matrices of "
                f"{target.columns} columns; the importance matrix is another model's"
            )
        return entry.matrices(target.matrices)

    def check(self, targets: Iterable[Target]) -> None:
        """Raise `CheckpointError` if the matrix does not belong to a model of these tensors."""
        known = [target for target in targets if self.of(target) is not None]
        if not known:
            raise CheckpointError(
                f"{self.path}: none of its {len(self.entries)} entries names a tensor of this "
                "model; the importance matrix is another model's"
            )

    def notes(self, targets: Iterable[Target]) -> list[str]:
        """Lines on what the matrix does not cover."""
        matrices = [target for target in targets if len(target.shape) > 1]
        unknown = [
            t.name for t in matrices if t.name.startswith("blk.") and t.name.endswith("weight")
        ]
        unknown = [
            name for name in unknown if name not in self.entries and "ffn_gate_inp" not in name
        ]
        unreached = {
            target.name: self.entries[target.name].unreached
            for target in matrices
            if target.name in self.entries and self.entries[target.name].unreached
        }
        lines = []
        if unknown:
            lines.append(f"{self.path} has no entry for {_few(unknown)}: quantized without")
        if unreached:
            total = sum(len(rows) for rows in unreached.values())
            named = [
                f"{name} {_few([str(row) for row in rows])}" for name, rows in unreached.items()
            ]
            lines.append(
                f"{total} experts were never reached by the text of {self.path} and take the mean "
                f"importance of their neighbours: {_few(named, 3)}"
            )
        return lines


def _few(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_importance(path: Path) -> Importance:
    """Read an importance matrix of either form.

    Raises `CheckpointError` for a file that is damaged or of another kind, `OSError` if it cannot
    be read.
    """
    with path.open("rb") as stream:
        magic = stream.read(4)
    return _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)


def _read_gguf(path: Path) -> Importance:
    try:
        with GGUFFile.open(path) as file:
            if file.text("general.type", "model") != "imatrix":
                raise CheckpointError(
                    f"{path}: a file of type {file.text('general.type', 'model')!r}, not an "
                    "importance matrix; make one with `localds imatrix`"
                )
            floats = {
                name: np.frombuffer(tensor.data.tobytes(), np.float32)
                for name, tensor in file.tensors.items()
                if tensor.type.name == "F32"
            }
            datasets = file.strings("imatrix.datasets", [])
            chunks = file.integer("imatrix.chunk_count", 0)
    except GGUFError as error:
        raise CheckpointError(str(error)) from None
    entries = {
        name.removesuffix(".in_sum2"): _entry(path, name, sums, floats)
        for name, sums in floats.items()
        if name.endswith(".in_sum2")
    }
    return _checked(Importance(path, entries, datasets, chunks))


def _entry(
    path: Path, name: str, sums: NDArray[np.float32], floats: dict[str, NDArray[np.float32]]
) -> Entry:
    counts = floats.get(name.removesuffix(".in_sum2") + ".counts")
    if counts is None or not len(counts) or len(sums) % len(counts):
        raise CheckpointError(f"{path}: {name} has no counts that fit its {len(sums)} values")
    means = sums.reshape(len(counts), -1) / np.maximum(counts, 1)[:, None]
    return Entry(means.ravel().astype(np.float32), counts)


def _read_legacy(path: Path) -> Importance:
    """The old form: for each weight a name, a number of calls and means multiplied by it."""
    raw = path.read_bytes()
    position = 0

    def take(size: int, what: str) -> bytes:
        nonlocal position
        if size < 0 or position + size > len(raw):
            raise CheckpointError(
                f"{path}: neither a GGUF file nor a whole importance matrix of the old form "
                f"({what} of {size} bytes at byte {position} of {len(raw)}); "
                "make one with `localds imatrix`"
            )
        position += size
        return raw[position - size : position]

    def integer(what: str) -> int:
        value: int = struct.unpack("<i", take(4, what))[0]
        return value

    entries = {}
    for _ in range(integer("the number of entries")):
        size = integer("a length")
        name = take(min(size, MAX_NAME_BYTES + 1) if size <= MAX_NAME_BYTES else -1, "a name")
        calls, count = integer("a number of calls"), integer("a number of values")
        values = np.frombuffer(take(4 * count, "the values"), "<f4").astype(np.float32)
        means = values / np.float32(max(calls, 1))
        entries[name.decode("utf-8", "replace")] = Entry(means, np.ones(1, np.float32))
    chunks, datasets = 0, []
    if position < len(raw):
        chunks = integer("the number of chunks")
        datasets = [take(integer("a length"), "a data set").decode("utf-8", "replace")]
    return _checked(Importance(path, entries, datasets, chunks))


def _checked(importance: Importance) -> Importance:
    if not importance.entries:
        raise CheckpointError(f"{importance.path}: the importance matrix has no entries")
    for name, entry in importance.entries.items():
        if not np.isfinite(entry.means).all() or (entry.means < 0).any():
            raise CheckpointError(
                f"{importance.path}: the entry for {name} holds values that are negative or not "
                "finite; collect the matrix again"
            )
    return importance

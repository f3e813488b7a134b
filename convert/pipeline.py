"""The stream from source to file: reading ahead, quantizing and writing go on at once.

The memory that it takes is a few blocks of rows, whatever the size of the tensors.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Protocol

import numpy as np

from convert.checkpoint import CheckpointError
from convert.files import fits_in_memory
from convert.output import write_at
from convert.source import RawBlock
from localds import _native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from convert.journal import Journal
    from convert.output import OutputFile
    from convert.source import Block, Target, Value
    from localds.gguf import GGMLType

AHEAD = 3
"""Blocks that are read before they are asked for."""

WAITING_BYTES = 128 << 20
"""Data that wait for the disk before quantizing waits, too."""

SYNC_BYTES = 256 << 20
SYNC_SECONDS = 5.0
"""The disk is waited for and the journal brought up to date after this much was written."""

_sync = getattr(os, "fdatasync", os.fsync)


class WrongDataError(CheckpointError):
    """Values of the source that cannot be right."""


class Importance(Protocol):
    """How much errors in each column of a matrix matter."""

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The keys `quantize.imatrix.*` that say where it comes from."""

    def of(self, target: Target) -> NDArray[np.float32] | None:
        """Weights float32 [matrices, columns] of a target; None where nothing is known."""


def stream(
    targets: Sequence[Target],
    types: Sequence[GGMLType],
    importance: Importance | None,
    writer: Writer,
    advance: Callable[[Target, float], None],
) -> None:
    """Write the data of all targets from `writer.journal.done` on, each in its type.

    `advance` is called with the bytes of the source that were dealt with since the last call.
    Raises `WrongDataError` for data that cannot be right, naming the tensor.
    """
    for index, block in _ahead(_blocks(targets, types, writer.journal.done)):
        target = targets[index]
        if isinstance(block, RawBlock):
            writer.write(index, block.first_row, block.data)
        else:
            writer.write(index, block.first_row, quantize(target, types[index], block, importance))
        rows = len(block.data)
        if block.first_row + rows == target.matrices * target.rows:
            writer.finish(index)
        advance(target, target.source_bytes * rows / (target.matrices * target.rows))


def quantize(
    target: Target, kind: GGMLType, block: Block, importance: Importance | None
) -> NDArray[np.uint8]:
    """A block's rows as they lie in the file, uint8 [rows, row_bytes]."""
    matrix = block.first_row // target.rows
    weights = None if importance is None else importance.of(target)
    row = None if weights is None else np.ascontiguousarray(weights[matrix])
    try:
        return _native.quantize(kind, np.ascontiguousarray(block.data), row)
    except ValueError as error:
        raise _wrong_data(target, kind, block, str(error)) from None


def _wrong_data(target: Target, kind: GGMLType, block: Block, problem: str) -> WrongDataError:
    """The error for what the native library refused, with the place in the source's tensor."""
    place = re.search(r"row (\d+), column (\d+)", problem)
    if place is None:
        return WrongDataError(f"convert {target.name}: {problem}")
    row, column = int(place[1]), int(place[2])
    value = float(block.data[row, column])
    matrix, first = divmod(block.first_row, target.rows)
    remedy = (
        f"which {kind.name} cannot hold; keep it wider with --keep '{target.name}=BF16'"
        if math.isfinite(value)
        else "so the source is damaged; fetch it again"
    )
    return WrongDataError(
        f"convert {target.name}: row {first + row}, column {column} of {target.origin(matrix)} is "
        f"{value:g}, {remedy}"
    )


def _blocks(
    targets: Sequence[Target], types: Sequence[GGMLType], start: int
) -> Iterator[tuple[int, Block | RawBlock]]:
    for index in range(start, len(targets)):
        target = targets[index]
        kept = target.read_raw is not None and target.stored == types[index].name
        row = 0
        for block in target.raw_blocks() if kept else target.blocks():
            if not kept and (block.data.ndim != 2 or block.data.shape[1] != target.columns):
                break
            yield index, block
            row += len(block.data)
        if row != target.matrices * target.rows:
            raise WrongDataError(
                f"read {target.name}: what the source holds does not make the shape {target.shape}"
            )


def _ahead(
    blocks: Iterator[tuple[int, Block | RawBlock]],
) -> Iterator[tuple[int, Block | RawBlock]]:
    """The same blocks, read in a thread of its own a few at a time before they are asked for."""
    pool = ThreadPoolExecutor(1, "localds-read")
    try:
        futures = deque(pool.submit(next, blocks, None) for _ in range(AHEAD))
        while (block := futures.popleft().result()) is not None:
            futures.append(pool.submit(next, blocks, None))
            yield block
    finally:
        pool.shutdown(cancel_futures=True)


class Writer:
    """Writes into the unfinished files in a thread of its own, and keeps the journal.

    On leaving the context whatever was handed over is written, and the journal is true.
    """

    def __init__(
        self, files: Sequence[OutputFile], descriptors: list[int], journal: Journal
    ) -> None:
        self.journal = journal
        self._files = files
        self._descriptors = descriptors
        self._pool = ThreadPoolExecutor(1, "localds-write")
        self._waiting = deque[tuple[Future[None], int]]()
        self._waiting_bytes = 0
        self._broken = False
        self._keep = fits_in_memory(sum(file.layout.size for file in files))
        self._done = journal.done
        self._unsynced = 0
        self._synced_at = time.monotonic()
        self._file_of = [number for number, file in enumerate(files) for _ in file.tensors]

    def write(self, index: int, row: int, data: NDArray[np.uint8]) -> None:
        """Write rows of a tensor, from `row` on; waits where the disk is far behind."""
        while self._waiting and self._waiting_bytes + data.nbytes > WAITING_BYTES:
            self._wait()
        self._hand_over(data.nbytes, self._write, index, row, data)

    def finish(self, index: int) -> None:
        """Say that all rows of a tensor were handed over."""
        self._hand_over(0, self._finish, index)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._wait()
        finally:
            self._pool.shutdown()
            with suppress(OSError) if kind or self._broken else nullcontext():
                self._sync()

    def _hand_over(self, size: int, work: Callable[..., None], *arguments: object) -> None:
        self._waiting.append((self._pool.submit(self._try, work, *arguments), size))
        self._waiting_bytes += size

    def _wait(self) -> None:
        future, size = self._waiting.popleft()
        self._waiting_bytes -= size
        future.result()

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        """Work unless earlier work failed: no tensor may count as done behind a gap."""
        if self._broken:
            return
        try:
            work(*arguments)
        except BaseException:
            self._broken = True
            raise

    def _write(self, index: int, row: int, data: NDArray[np.uint8]) -> None:
        number = self._file_of[index]
        file = self._files[number]
        place = file.layout.offsets[index - file.first] + row * data.shape[1]
        try:
            write_at(self._descriptors[number], data.reshape(-1).data, place)
        except OSError as error:
            reason = f"{error.strerror} while writing {file.tensors[index - file.first].name}"
            raise OSError(error.errno, reason, str(file.part)) from error
        self._unsynced += data.nbytes
        late = time.monotonic() - self._synced_at > SYNC_SECONDS
        if self._unsynced >= SYNC_BYTES or (late and self._done > self.journal.done):
            self._sync()

    def _finish(self, index: int) -> None:
        self._done = index + 1

    def _sync(self) -> None:
        """Wait for the disk and note what it has; files too large to stay leave the page cache."""
        for descriptor in self._descriptors:
            _sync(descriptor)
            if not self._keep and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._done > self.journal.done:
            self.journal.write(self._done)
        self._unsynced = 0
        self._synced_at = time.monotonic()

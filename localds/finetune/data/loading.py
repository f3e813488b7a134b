"""From a data source to examples for training and evaluation."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from localds.finetune.data.errors import DataError, Problems, RecordError
from localds.finetune.data.examples import Encoded, Examples, ExamplesBuilder
from localds.finetune.data.files import JSON_SUFFIXES, Files, find_files
from localds.finetune.data.records import Conversation, Record, Text, read_record
from localds.finetune.data.report import DataReport
from localds.finetune.data.splitting import held_out
from localds.finetune.data.values import read_text, read_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.finetune.data.encoder import Encoder

    Progress = Callable[[str, int, int], None]

# Mistakes after which encoding ends: a template that does not fit refuses every record.
_ENOUGH = 1000


@dataclass(frozen=True, slots=True)
class Data:
    """Examples to train on and to evaluate on (maybe none), and what became of the records."""

    train: Examples
    valid: Examples
    report: DataReport


def load_data(
    source: str | Path,
    encoder: Encoder,
    *,
    valid: str | Path | None = None,
    share: float = 0.05,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Data:
    """Read and encode `source`: a file, a folder, or owner/name[:PATTERN] on the hub.

    Evaluation is on `valid` if it is given, else on the source's files of that split, else on a
    `share` of the records that `seed` chooses. All files are read and checked before anything is
    encoded. `on_progress(what, done, total)` tells of "checking" in bytes and "encoding" in
    records. Raises `DataError`, which lists everything that is wrong, `HubError` and `OSError`.
    """
    files = find_files(source)
    if valid is not None:
        apart = find_files(valid)
        files = Files(files.train, (*apart.train, *apart.valid), (*files.test, *files.valid))
    paths = (*files.train, *files.valid)
    total = _check(paths, on_progress)
    collector = _Collector(encoder, total, on_progress)
    problems = Problems()
    train = collector.collect(files.train, problems)
    evaluation = collector.collect(files.valid, problems)
    problems.check()
    collector.report.unused = tuple(map(str, files.test))
    data = _divided(train, evaluation if files.valid else None, share, seed, collector.report)
    if not len(data.train):
        raise DataError(
            f"{source}: nothing is left to train on: in all {collector.report.dropped:,} examples "
            f"what is to be learned begins after {encoder.length:,} tokens; choose a larger length"
        )
    return data


def read_records(
    path: Path, problems: Problems, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Record]]:
    """Yield (line, record) of a file; what cannot be read goes to `problems`."""
    if path.suffix.lower() not in JSON_SUFFIXES:
        try:
            text = read_text(path)
        except ValueError as error:
            problems.add(path, None, error)
            return
        if text.strip():
            yield 1, Text(text, cut=True)
        return
    for line, value in read_values(path, problems, on_bytes):
        try:
            record = read_record(value)
        except RecordError as error:
            problems.add(path, line, error)
        else:
            yield line, record


def _check(paths: Sequence[Path], on_progress: Progress | None) -> int:
    """Read all files once; returns the number of records. Raises `DataError`."""
    problems = Problems()
    size = sum(path.stat().st_size for path in paths)
    done = total = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress:
            on_progress("checking", done, size)

    for path in paths:
        before = problems.count
        records = sum(1 for _ in read_records(path, problems, advance))
        if not records and problems.count == before:
            problems.add(path, None, "the file holds no examples")
        total += records
    problems.check()
    return total


@dataclass(frozen=True, slots=True)
class _Collected:
    """Examples, and a digest of the record of each: uint64 [n]."""

    examples: Examples
    digests: NDArray[np.uint64]


class _Collector:
    """Encodes records and counts what becomes of them."""

    def __init__(self, encoder: Encoder, total: int, on_progress: Progress | None) -> None:
        self.report = DataReport()
        self._encoder, self._total, self._on_progress = encoder, total, on_progress

    def collect(self, paths: Sequence[Path], problems: Problems) -> _Collected:
        builder, digests = ExamplesBuilder(), array("Q")
        for path in paths:
            for line, record in read_records(path, problems):
                try:
                    encoded = self._encoder.encode(record)
                except ValueError as error:
                    problems.add(path, line, error)
                    if problems.count >= _ENOUGH:
                        problems.check()
                else:
                    self._add(record, encoded, builder, digests)
                self.report.records += 1
                if self._on_progress:
                    self._on_progress("encoding", self.report.records, self._total)
        return _Collected(builder.build(), np.frombuffer(digests, np.uint64))

    def _add(
        self, record: Record, encoded: list[Encoded], builder: ExamplesBuilder, digests: array[int]
    ) -> None:
        report = self.report
        whole = isinstance(record, Conversation)
        report.split += whole and len(encoded) > 1
        digest = _digest(encoded) if whole else None
        for example in encoded:
            fitting = self._encoder.fit(example)
            report.longest = max(report.longest, len(example))
            if fitting is None:
                report.dropped += 1
                continue
            lost = len(example) - len(fitting)
            report.truncated += lost > 0
            report.lost_tokens += lost
            builder.add(fitting)
            digests.append(_digest([example]) if digest is None else digest)


def _digest(encoded: list[Encoded]) -> int:
    """The same for records that the model sees the same."""
    state = blake2b(digest_size=8)
    for example in encoded:
        state.update(example.ids.tobytes())
    return int.from_bytes(state.digest(), "little")


def _divided(
    train: _Collected, valid: _Collected | None, share: float, seed: int, report: DataReport
) -> Data:
    if valid is None:
        chosen = held_out(train.digests, share, seed)
        evaluation = train.examples.subset(np.flatnonzero(chosen))
    else:
        # An example that is evaluated must not be learned by heart.
        chosen = np.isin(train.digests, valid.digests)
        evaluation = valid.examples
        report.repeated = int(chosen.sum())
    rest = train.examples.subset(np.flatnonzero(~chosen))
    report.examples, report.valid = len(rest) + len(evaluation), len(evaluation)
    report.tokens = rest.tokens + evaluation.tokens
    report.trained_tokens = rest.trained_tokens + evaluation.trained_tokens
    return Data(rest, evaluation, report)

"""One conversion: what to write where, and doing it so that it can be cut off at any moment."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convert.checkpoint import CheckpointError
from convert.journal import (
    Fingerprint,
    Journal,
    digest,
    journal_path,
    leftover_names,
    weight_files,
)
from convert.output import (
    OutputFile,
    check_disk,
    check_free_names,
    plan_files,
    publish,
    write_header,
)
from convert.pipeline import Importance, Writer, WrongDataError, stream
from convert.recipes import choose_types, file_type
from localds.gguf.write import TensorInfo
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convert.source import Source, Target, Value
    from localds.gguf import GGMLType


class StoppedError(OSError):
    """The conversion stopped before its end; what is done stays on the disk for a resumption."""


class Progress:
    """What a conversion tells while it runs; this one listens to nothing."""

    def note(self, line: str) -> None:
        """Take one line that the user should see."""

    def begin(self, total: int, done: int) -> None:
        """Take the bytes of the source, and how many of them an earlier attempt dealt with."""

    def advance(self, target: Target, size: float) -> None:
        """Take `size` bytes of the source as dealt with; they belong to `target`."""


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that can be carried out. `types` are those of `source.targets`, in order."""

    source: Source
    output: Path
    types: list[GGMLType]
    importance: Importance | None
    files: list[OutputFile]
    fingerprint: Fingerprint

    @classmethod
    def plan(
        cls,
        source: Source,
        output: Path,
        *,
        recipe: str,
        keep: Sequence[str] = (),
        importance: Importance | None = None,
        split: int | None = None,
    ) -> Job:
        """Choose types and lay out the files; nothing is written.

        Raises `ValueError` for a recipe that does not fit and `OSError` for an output folder that
        does not exist.
        """
        if not output.parent.is_dir():
            raise FileNotFoundError(
                f"convert: the folder {output.parent} does not exist; make it, or choose another "
                "with -o"
            )
        types = choose_types(source, recipe, keep, importance)
        infos = [
            TensorInfo(target.name, target.shape, kind)
            for target, kind in zip(source.targets, types, strict=True)
        ]
        metadata: dict[str, Value] = {
            "general.architecture": source.architecture,
            **source.metadata,
        }
        # There already where tensors keep their types.
        metadata.setdefault("general.file_type", file_type(recipe, types))
        metadata["localds.recipe"] = ", ".join([recipe, *keep])
        if importance is not None:
            metadata |= importance.metadata
        files = plan_files(output, metadata, infos, split)
        fingerprint = Fingerprint.of(
            source.path,
            files,
            recipe=recipe,
            keep=keep,
            importance=_importance_digest(source, importance),
        )
        return cls(source, output, types, importance, files, fingerprint)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.layout.size for file in self.files)

    def run(
        self, *, resume: bool = False, force: bool = False, progress: Progress | None = None
    ) -> list[Path]:
        """Write the files and return their paths, which appear once all are whole.

        Until then each has `.part` behind its name, and a journal lies beside them. They stay after
        Ctrl-C and where reading or writing fails (`StoppedError`), and `resume` goes on with them;
        they are deleted where the source's values are at fault (`WrongDataError`). `force` replaces
        files that exist.
        """
        progress = progress or Progress()
        journal = Journal(
            journal_path(self.output), self.fingerprint, [file.path.name for file in self.files]
        )
        resume = resume and self._begun(journal, progress)
        complete = resume and journal.done == len(self.types)
        self._check_not_source()
        if not force and not complete:
            check_free_names(self.files)
        check_disk(self.files)
        if not complete:
            self._write(journal, resume, progress)
        publish(self.files)
        journal.remove()
        return [file.path for file in self.files]

    def _begun(self, journal: Journal, progress: Progress) -> bool:
        """Whether there is something to go on with, which `journal` then knows."""
        if not journal.path.exists():
            progress.note(f"{journal.path.name} does not exist: nothing to resume, starting afresh")
            return False
        journal.read()
        for file in self.files:
            whole = file.path if journal.done == len(self.types) else file.part
            if not file.part.exists() and not whole.exists():
                raise CheckpointError(
                    f"resume: {file.part} is missing; start again without --resume"
                )
        return True

    def _write(self, journal: Journal, resume: bool, progress: Progress) -> None:
        with ExitStack() as stack:
            descriptors = [_open_locked(file.part, stack) for file in self.files]
            if resume:
                self._check_headers(descriptors)
            else:
                self._start_afresh(journal, descriptors, progress)
            sizes = [target.source_bytes for target in self.source.targets]
            progress.begin(sum(sizes), sum(sizes[: journal.done]))
            try:
                with Writer(self.files, descriptors, journal) as writer:
                    stream(
                        self.source.targets, self.types, self.importance, writer, progress.advance
                    )
                for file, descriptor in zip(self.files, descriptors, strict=True):
                    os.ftruncate(descriptor, file.layout.size)
                    os.fsync(descriptor)
            except WrongDataError:
                self._delete(journal)
                raise
            except (OSError, CheckpointError) as error:
                raise StoppedError(self._stopped(error, journal)) from error

    def _start_afresh(
        self, journal: Journal, descriptors: Sequence[int], progress: Progress
    ) -> None:
        left = leftover_names(journal.path)
        if left:
            progress.note(
                f"replacing the unfinished {self.output.name}.part (--resume would go on with it)"
            )
        journal.remove()
        for name in set(left) - set(journal.names):
            self.output.with_name(name + ".part").unlink(missing_ok=True)
        for file, descriptor in zip(self.files, descriptors, strict=True):
            write_header(file, descriptor)
            os.fsync(descriptor)
        journal.write(0)

    def _check_headers(self, descriptors: Sequence[int]) -> None:
        for file, descriptor in zip(self.files, descriptors, strict=True):
            header = file.layout.header
            if os.pread(descriptor, len(header), 0) != header:
                raise CheckpointError(
                    f"resume: {file.part} is not the file that its journal describes; start again "
                    "without --resume"
                )

    def _check_not_source(self) -> None:
        inputs = weight_files(self.source.path)
        for file in self.files:
            if file.path.exists() and any(file.path.samefile(path) for path in inputs):
                raise FileExistsError(
                    f"convert: {file.path} is the source itself; name another output with -o"
                )

    def _stopped(self, error: OSError | CheckpointError, journal: Journal) -> str:
        reason, remedy = str(error), ""
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror} ({error.filename or self.output.parent})"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            used = sum(file.part.stat().st_blocks * 512 for file in self.files)
            remedy = f"free {format_size(self.size - used)} and "
        return (
            f"convert: {reason}; {journal.done} of {len(self.types)} tensors are kept in "
            f"{self.output.name}.part: {remedy}run the same command with --resume"
        )

    def _delete(self, journal: Journal) -> None:
        journal.remove()
        for file in self.files:
            file.part.unlink(missing_ok=True)


def _open_locked(path: Path, stack: ExitStack) -> int:
    """Open or make a file that nobody else may write to as long as the stack is open."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"convert: another process is writing {path}; wait for it, or choose another output"
        ) from None
    return descriptor


def _importance_digest(source: Source, importance: Importance | None) -> str:
    if importance is None:
        return ""
    weights = (importance.of(target) for target in source.targets)
    return digest(np.ascontiguousarray(array).data for array in weights if array is not None)

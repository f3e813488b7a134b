"""The journal beside an unfinished file: what it is made of and how many tensors are done."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from convert.checkpoint import CheckpointError
from localds import __version__
from localds.gguf.splits import PART_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from convert.output import OutputFile


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that the bytes of the output follow from.

    `source` holds name, size in bytes and time of change in ns of each file with weights, `header`
    a digest of the headers to write, so of metadata, types and places.
    """

    program: str
    source: list[list[str | int]]
    recipe: str
    keep: list[str]
    importance: str
    header: str

    @classmethod
    def of(
        cls,
        source: Path,
        files: Sequence[OutputFile],
        *,
        recipe: str,
        keep: Sequence[str],
        importance: str,
    ) -> Fingerprint:
        """The fingerprint of a conversion; `importance` is a digest of the matrix, or empty."""
        header = hashlib.sha256()
        for file in files:
            header.update(file.layout.header)
        return cls(
            f"localds {__version__}",
            [_identity(path) for path in weight_files(source)],
            recipe,
            list(keep),
            importance,
            header.hexdigest(),
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, in words."""
        words = {
            "program": "the version of localds",
            "source": "the source's files",
            "recipe": "--type",
            "keep": "--keep",
            "importance": "--imatrix",
            "header": "the tensors, metadata or --split",
        }
        mine, theirs = asdict(self), asdict(other)
        return [word for key, word in words.items() if mine[key] != theirs[key]]


class Journal:
    """The file NAME.gguf.part.json, replaced as a whole at each change.

    `done` counts the tensors whose data are on the disk.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, names: list[str]) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.names = names
        self.done = 0

    def read(self) -> None:
        """Take over what an earlier attempt left. Raises `CheckpointError` where it was another."""
        try:
            found = json.loads(self.path.read_text())
            before = Fingerprint(**found["fingerprint"])
            done, names = int(found["done"]), list(found["names"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"resume: {self.path} is damaged ({error}); start again without --resume"
            ) from None
        differences = self.fingerprint.differences(before)
        if differences or names != self.names:
            raise CheckpointError(
                f"resume: {self.path.name.removesuffix('.json')} was begun differently "
                f"({', '.join(differences) or 'the name of the output'} changed); give what was "
                "given then, or start again without --resume"
            )
        self.done = done

    def write(self, done: int) -> None:
        """Record that the first `done` tensors are on the disk, which they must be by now."""
        self.done = done
        content = {"done": done, "names": self.names, "fingerprint": asdict(self.fingerprint)}
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("w") as stream:
            json.dump(content, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self.path)

    def remove(self) -> None:
        """Forget the attempt."""
        self.path.unlink(missing_ok=True)


def journal_path(output: Path) -> Path:
    """Where the journal of a conversion to `output` lies."""
    return output.with_name(output.name + ".part.json")


def leftover_names(path: Path) -> list[str]:
    """The final names of the files that an earlier attempt was to write; none if unknown."""
    try:
        names = json.loads(path.read_text())["names"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and "/" not in name]


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights: a folder's safetensors, or a GGUF file and its parts."""
    if source.is_dir():
        return sorted(source.glob("*.safetensors"))
    part = PART_NAME.fullmatch(source.name)
    if not part:
        return [source]
    matches = (PART_NAME.fullmatch(path.name) for path in source.parent.iterdir())
    names = {match[0] for match in matches if match and match["prefix"] == part["prefix"]}
    return [source.with_name(name) for name in sorted(names)]


def digest(arrays: Iterable[memoryview]) -> str:
    """A digest of arrays in their order."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(array)
    return state.hexdigest()


def _identity(path: Path) -> list[str | int]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]

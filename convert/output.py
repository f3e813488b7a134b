"""The files of one conversion: their names, headers and places, and their renaming at the end."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds.gguf.write import Layout, TensorInfo, lay_out, sync_folder
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from localds.gguf.write import WritableValue

DISK_MARGIN = 64 << 20
"""Bytes that must stay free on the disk of the output."""

MAX_FILES = 65535
"""split.count is a u16."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file to write: `path` is its final name, `first` the index of its first tensor."""

    path: Path
    first: int
    tensors: tuple[TensorInfo, ...]
    layout: Layout

    @property
    def part(self) -> Path:
        """The name of the file until it is complete."""
        return self.path.with_name(self.path.name + ".part")


def plan_files(
    output: Path,
    metadata: Mapping[str, WritableValue],
    tensors: Sequence[TensorInfo],
    split: int | None,
) -> list[OutputFile]:
    """Lay out one file `output`, or with `split` several of at most that many bytes.

    Those are named PREFIX-00001-of-0000N.gguf after `output` without its ending; a tensor larger
    than `split` gets a file of its own. All in one file, it is `output` itself.
    """
    groups = _groups(metadata, tensors, split) if split else [tuple(tensors)]
    if len(groups) == 1:
        return [OutputFile(output, 0, groups[0], lay_out(metadata, groups[0]))]
    if len(groups) > MAX_FILES:
        raise ValueError(
            f"--split: {format_size(split or 0)} makes {len(groups)} files, and {MAX_FILES} can be "
            "numbered; choose a larger size"
        )
    prefix = output.name.removesuffix(".gguf")
    files: list[OutputFile] = []
    for number, group in enumerate(groups):
        name = f"{prefix}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        keys = _split_keys(number, len(groups), len(tensors))
        header = {**metadata, **keys} if number == 0 else keys
        first = sum(len(file.tensors) for file in files)
        files.append(OutputFile(output.with_name(name), first, group, lay_out(header, group)))
    return files


def check_disk(files: Sequence[OutputFile]) -> None:
    """Raise `OSError` where the files do not fit beside what the disk holds.

    Space that their unfinished parts already take is counted as theirs.
    """
    folder = files[0].path.parent
    total = sum(file.layout.size for file in files)
    taken = sum(file.part.stat().st_blocks * 512 for file in files if file.part.exists())
    missing = total - taken + DISK_MARGIN - shutil.disk_usage(folder).free
    if missing > 0:
        raise OSError(
            f"convert: {files[0].path.name} takes {format_size(total)} and {folder} has not that "
            f"much left; free {format_size(missing)}, choose another folder with -o, or a smaller "
            "--type"
        )


def check_free_names(files: Sequence[OutputFile]) -> None:
    """Raise `FileExistsError` where a final name is taken."""
    for file in files:
        if file.path.exists():
            raise FileExistsError(
                f"convert: {file.path} exists; add --force to replace it, or name another with -o"
            )


def publish(files: Sequence[OutputFile]) -> None:
    """Give all files their final names, the first one last: by it a split model is opened.

    Files that already have theirs, from an attempt that was cut off just here, stay.
    """
    for file in reversed(files):
        if file.part.exists():
            file.part.replace(file.path)
    sync_folder(files[0].path.parent)


def write_header(file: OutputFile, descriptor: int) -> None:
    """Empty the file and write everything in front of the data."""
    os.ftruncate(descriptor, 0)
    write_at(descriptor, memoryview(file.layout.header), 0)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all bytes at a place of a file."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


def _groups(
    metadata: Mapping[str, WritableValue], tensors: Sequence[TensorInfo], split: int
) -> list[tuple[TensorInfo, ...]]:
    """Tensors of each file, in order: as many as fit into `split` bytes with their header."""
    keys = _split_keys(0, 1, len(tensors))
    header = len(lay_out({**metadata, **keys}, []).header)
    groups: list[tuple[TensorInfo, ...]] = []
    group: list[TensorInfo] = []
    room = split - header
    for tensor in tensors:
        size = _file_bytes(tensor)
        if group and size > room:
            groups.append(tuple(group))
            group = []
            room = split - len(lay_out(keys, []).header)
        group.append(tensor)
        room -= size
    return [*groups, tuple(group)]


def _file_bytes(tensor: TensorInfo) -> int:
    """Most that a tensor adds to a file: its data and its entry in the header, both padded."""
    return lay_out({}, [tensor]).size


def _split_keys(number: int, count: int, tensors: int) -> dict[str, WritableValue]:
    return {
        "split.no": np.uint16(number),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(tensors),
    }

"""Split models: PREFIX-00001-of-00003.gguf and so on, of which the first names the model."""

from __future__ import annotations

import re
from pathlib import Path

from localds.gguf.error import GGUFError, quote
from localds.gguf.metadata import Metadata, TypedMetadata
from localds.gguf.parse import Part, open_part
from localds.gguf.tensor import Tensor

PART_NAME = re.compile(r"(?P<prefix>.+)-\d{5}-of-\d{5}\.gguf", re.DOTALL)


def open_parts(path: Path) -> list[Part]:
    """Parse the file `path`, and where it is the first part of a split model, the other parts.

    Raises `GGUFError` where `path` is another part, or a part is missing or of another model.
    """
    first = open_part(path)
    head = TypedMetadata(path, Metadata(first.entries))
    count = head.integer("split.count", 1)
    if count <= 1:
        return [first]
    if count > 99999:
        raise head.wrong("split.count", f"is {count}, too many to be numbered")
    name = PART_NAME.fullmatch(path.name)
    prefix = name["prefix"] if name else "PREFIX"
    number = head.integer("split.no")
    if number != 0:
        raise GGUFError(
            f"{path}: this is part {number + 1} of {count} of a split model; "
            f"open the first one, {_part_path(path, prefix, 0, count)}",
            field="key 'split.no'",
            offset=first.entries["split.no"].offset,
        )
    if path.name != _part_path(path, prefix, 0, count).name:
        raise GGUFError(
            f"{path}: this is part 1 of {count} of a split model, whose parts are found by name; "
            f"name them {_part_path(path, prefix, 0, count).name} and so on",
            field="key 'split.count'",
            offset=first.entries["split.count"].offset,
        )
    others = [_part_path(path, prefix, number, count) for number in range(1, count)]
    _check_present(path, others)
    parts = [first, *(_open_other(other, i + 1, count) for i, other in enumerate(others))]
    _check_total(head, parts)
    return parts


def merge_tensors(parts: list[Part]) -> dict[str, Tensor]:
    """The tensors of all parts by name; raises `GGUFError` for a name that two parts have."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise GGUFError.at(
                    part.path,
                    f"tensor {quote(name)}",
                    tensor.offset,
                    f"is in {tensors[name].path.name} too, so the parts do not belong together: "
                    "fetch all of them again",
                )
            tensors[name] = tensor
    return tensors


def _part_path(path: Path, prefix: str, number: int, count: int) -> Path:
    return path.with_name(f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf")


def _check_present(first: Path, others: list[Path]) -> None:
    missing = [other.name for other in others if not other.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GGUFError(
            f"{first}: its part {missing[0]}{more} is missing; "
            f"put all {len(others) + 1} parts in one folder"
        )


def _open_other(path: Path, number: int, count: int) -> Part:
    part = open_part(path)
    head = TypedMetadata(path, Metadata(part.entries))
    for key, expected in (("split.no", number), ("split.count", count)):
        found = head.integer(key)
        if found != expected:
            raise head.wrong(key, f"is {found} where {expected} is expected")
    return part


def _check_total(head: TypedMetadata, parts: list[Part]) -> None:
    expected = head.integer("split.tensors.count")
    found = sum(len(part.tensors) for part in parts)
    if found != expected:
        raise head.wrong(
            "split.tensors.count", f"is {expected} but the {len(parts)} parts hold {found} tensors"
        )

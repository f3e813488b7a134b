"""Metadata of a file: values by key, and getters that check the kind of value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Final, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from localds.gguf.error import GGUFError, quote

Array: TypeAlias = NDArray[np.generic]
Value: TypeAlias = int | float | bool | str | Array | list[str]

T = TypeVar("T")
D = TypeVar("D")

_LENGTH = Struct("<Q")


def decode(raw: bytes) -> str:
    """Text of a file: UTF-8, each byte that is not kept as a lone surrogate (PEP 383)."""
    return raw.decode("utf-8", "surrogateescape")


class StringArray:
    """An array of strings, decoded when it is first asked for.

    A vocabulary's 200,000 strings take as long to decode as everything else in the file together,
    and not every command needs them. `raw` is a view of `count` strings, each a u64 length and its
    bytes, whose lengths were checked.
    """

    def __init__(self, raw: memoryview, count: int) -> None:
        self._raw = raw
        self._count = count
        self._strings: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    def strings(self) -> list[str]:
        """The strings, the same list at each call."""
        if self._strings is None:
            self._strings = list(self._decode())
            self._raw = memoryview(b"")
        return self._strings

    def _decode(self) -> Iterator[str]:
        raw = self._raw.tobytes()
        length_at = _LENGTH.unpack_from
        position = 0
        for _ in range(self._count):
            start = position + 8
            position = start + length_at(raw, position)[0]
            yield decode(raw[start:position])


@dataclass(frozen=True, slots=True)
class Entry:
    """A value, its kind in words ("u32", "array of 3 f32"), and the offset of its key in bytes."""

    value: int | float | bool | str | Array | StringArray
    kind: str
    offset: int


class Metadata(Mapping[str, Value]):
    """The values of a file by key. Arrays and lists are shared: treat them as read-only."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries: Final = entries

    def __getitem__(self, key: str) -> Value:
        value = self.entries[key].value
        return value.strings() if isinstance(value, StringArray) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries


class _Required:
    """Stands for a default that was not given."""


_REQUIRED: Final = _Required()


class TypedMetadata:
    """Getters that return the right kind of value or raise `GGUFError` naming file and key.

    Without a default a missing key is an error; a value of the wrong kind always is.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path = path
        self.metadata = metadata

    def has(self, key: str) -> bool:
        """Whether the file has `key`."""
        return key in self.metadata

    @overload
    def integer(self, key: str) -> int: ...
    @overload
    def integer(self, key: str, default: D) -> int | D: ...
    def integer(self, key: str, default: D | _Required = _REQUIRED) -> int | D:
        """An integer of any width; not a bool."""
        return self._get(key, default, "an integer", _integer)

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: D) -> float | D: ...
    def number(self, key: str, default: D | _Required = _REQUIRED) -> float | D:
        """A finite float, or an integer."""
        return self._get(key, default, "a finite number", _number)

    @overload
    def flag(self, key: str) -> bool: ...
    @overload
    def flag(self, key: str, default: D) -> bool | D: ...
    def flag(self, key: str, default: D | _Required = _REQUIRED) -> bool | D:
        """A bool."""
        return self._get(key, default, "a bool", _flag)

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: D) -> str | D: ...
    def text(self, key: str, default: D | _Required = _REQUIRED) -> str | D:
        """A string; bytes that are not UTF-8 are lone surrogates in it."""
        return self._get(key, default, "a string", _text)

    @overload
    def integers(self, key: str) -> list[int]: ...
    @overload
    def integers(self, key: str, default: D) -> list[int] | D: ...
    def integers(self, key: str, default: D | _Required = _REQUIRED) -> list[int] | D:
        """The values of an array of integers, or of one integer."""
        return self._get(key, default, "an integer or an array of integers", _integers)

    @overload
    def strings(self, key: str) -> list[str]: ...
    @overload
    def strings(self, key: str, default: D) -> list[str] | D: ...
    def strings(self, key: str, default: D | _Required = _REQUIRED) -> list[str] | D:
        """The values of an array of strings: a shared list, not to be changed."""
        return self._get(key, default, "an array of strings", _strings)

    def _get(
        self,
        key: str,
        default: D | _Required,
        expected: str,
        convert: Callable[[object], T | None],
    ) -> T | D:
        entry = self.metadata.entries.get(key)
        if entry is None:
            if isinstance(default, _Required):
                raise GGUFError(
                    f"{self.path}: key {quote(key)} is missing ({expected} is expected); "
                    "convert the checkpoint again or fetch the complete file",
                    field=f"key {quote(key)}",
                )
            return default
        value = convert(entry.value)
        if value is None:
            raise self.wrong(key, f"is {_describe(entry)}, expected {expected}")
        return value

    def wrong(self, key: str, problem: str) -> GGUFError:
        """An error about the value of `key`, which the file has."""
        field = f"key {quote(key)}"
        remedy = "the file is damaged or was converted wrongly: fetch or convert it again"
        offset = self.metadata.entries[key].offset
        return GGUFError.at(self.path, field, offset, f"{problem}; {remedy}")


def _describe(entry: Entry) -> str:
    if isinstance(entry.value, float) and not math.isfinite(entry.value):
        return f"{entry.kind} {entry.value}"
    return entry.kind


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    integer = _integer(value)
    return None if integer is None else float(integer)


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _integers(value: object) -> list[int] | None:
    if isinstance(value, np.ndarray):
        return [int(item) for item in value.tolist()] if value.dtype.kind in "iu" else None
    integer = _integer(value)
    return None if integer is None else [integer]


def _strings(value: object) -> list[str] | None:
    return value.strings() if isinstance(value, StringArray) else None

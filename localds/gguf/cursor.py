"""A position in a mapped file; nothing is read or allocated before it is known to lie inside."""

from __future__ import annotations

from mmap import mmap
from pathlib import Path
from struct import Struct

from localds.gguf.error import GGUFError
from localds.gguf.metadata import decode

MAX_LENGTH = 1 << 30
"""Longest string (bytes) and array (items) that a file may hold."""

MAX_STRINGS = 1 << 24
"""Most strings in all arrays of a file; vocabularies stay below 2^20. Walking them takes 0.1 µs
each, so without this bound a hostile file of many GB would hang the reader."""

U32 = Struct("<I")
U64 = Struct("<Q")


class Cursor:
    """Reads a file's header in order. `field` arguments name what is being read, for errors."""

    def __init__(self, path: Path, mapped: mmap) -> None:
        self.path = path
        self.size = len(mapped)
        self.position = 0
        self.buffer = memoryview(mapped)
        self._strings_left = MAX_STRINGS

    def fail(self, field: str, problem: str, offset: int | None = None) -> GGUFError:
        """An error at `offset`, by default the position."""
        return GGUFError.at(self.path, field, self.position if offset is None else offset, problem)

    def damaged(self, field: str, problem: str, offset: int | None = None) -> GGUFError:
        """An error about something that no writer of GGUF does."""
        return self.fail(field, f"{problem}; the file is damaged: fetch it again", offset)

    def cut_short(self, field: str, needed: int, offset: int) -> GGUFError:
        """An error about `needed` bytes at `offset` that the file does not have."""
        return self.fail(
            field,
            f"{needed} bytes are expected here, but the file has {self.size - offset} more (it has "
            f"{self.size} in all); is the download incomplete? Fetch it again",
            offset,
        )

    def take(self, size: int, field: str) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.position
        if size > self.size - start:
            raise self.cut_short(field, size, start)
        self.position = start + size
        return start

    def u32(self, field: str) -> int:
        """An unsigned 32-bit integer."""
        value: int = U32.unpack_from(self.buffer, self.take(4, field))[0]
        return value

    def u64(self, field: str) -> int:
        """An unsigned 64-bit integer."""
        value: int = U64.unpack_from(self.buffer, self.take(8, field))[0]
        return value

    def count(self, field: str, item_bytes: int) -> int:
        """A u64 number of items that take at least `item_bytes` each in the rest of the file."""
        count = self.u64(field)
        if count * item_bytes > self.size - self.position:
            raise self.cut_short(field, count * item_bytes, self.position)
        return count

    def text(self, field: str) -> str:
        """A string: u64 length, then its bytes."""
        offset = self.position
        length = self.u64(field)
        if length > MAX_LENGTH:
            raise self.damaged(field, f"a string of {length} bytes", offset)
        start = self.take(length, field)
        return decode(self.buffer[start : start + length].tobytes())

    def skip_strings(self, count: int, field: str) -> memoryview:
        """Step over `count` strings, checking each length, and return a view of them."""
        self._strings_left -= count
        if self._strings_left < 0:
            raise self.damaged(field, f"more than {MAX_STRINGS} strings in arrays")
        first = position = self.position
        buffer, last, length_at = self.buffer, self.size - 8, U64.unpack_from
        for _ in range(count):
            if position > last:
                raise self.cut_short(field, 8, min(position, self.size))
            length = length_at(buffer, position)[0]
            if length > MAX_LENGTH:
                raise self.damaged(field, f"an item of {length} bytes", position)
            position += 8 + length
        if position > self.size:
            raise self.cut_short(field, position - first, first)
        self.position = position
        return buffer[first:position]

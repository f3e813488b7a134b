"""JSON values from a file, one at a time, each with its line; what cannot be read is noted."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

from localds.finetune.data.errors import RecordError
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from localds.finetune.data.errors import Problems

MAX_RECORD: Final = 16 << 20
"""Bytes of one record: as much as a chat template may be given."""

_BLANK = re.compile(r"[ \t\r\n]*")
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises `ValueError` unless it is UTF-8."""
    return _decode(path.read_bytes().removeprefix(codecs.BOM_UTF8))


def read_values(
    path: Path, problems: Problems, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for each record of a JSON Lines file, or of a file with one JSON list.

    Empty lines are skipped. Whatever cannot be read goes to `problems`. `on_bytes` is told the
    number of bytes that were read each time.
    """
    with path.open("rb") as file:
        start = file.read(4096)
        if start.startswith(_WIDE_MARKS):
            problems.add(path, None, "the text is UTF-16; save it as UTF-8")
            return
        mark = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        file.seek(mark)
        if start[mark:].lstrip()[:1] == b"[":
            yield from _read_list(path, file, problems)
            if on_bytes:
                on_bytes(path.stat().st_size)
        else:
            yield from _read_lines(path, file, problems, on_bytes)


def _read_lines(
    path: Path, file: BinaryIO, problems: Problems, on_bytes: Callable[[int], None] | None
) -> Iterator[tuple[int, Any]]:
    number = 0
    while data := file.readline(MAX_RECORD + 1):
        number += 1
        if on_bytes:
            on_bytes(len(data))
        if len(data) > MAX_RECORD:
            problems.add(path, number, _too_long())
            _skip_line(file, data)
        elif data.strip():
            try:
                yield number, parse(_decode(data.rstrip(b"\r\n")))
            except ValueError as error:
                problems.add(path, number, error)


def _skip_line(file: BinaryIO, data: bytes) -> None:
    while data and not data.endswith(b"\n"):
        data = file.readline(MAX_RECORD)


def _read_list(path: Path, file: BinaryIO, problems: Problems) -> Iterator[tuple[int, Any]]:
    """The items of a list, with the lines in which they begin."""
    try:
        text = _decode(file.read())
    except ValueError as error:
        problems.add(path, None, error)
        return
    line, at, seen = 1, text.index("[") + 1, 0
    while True:
        at = _after_blank(text, at)
        line, seen = line + text.count("\n", seen, at), at
        if text[at : at + 1] == "]":
            break
        try:
            value, end = _parse_at(text, at)
        except ValueError as error:
            # Where the next item begins cannot be known.
            problems.add(path, line, f"{error}; what follows it was not read")
            return
        if end - at > MAX_RECORD:
            problems.add(path, line, _too_long())
        else:
            yield line, value
        at = _after_blank(text, end)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            problems.add(path, line, "after this record the list goes on without a comma or ]")
            return
    if text[at + 1 :].strip():
        problems.add(path, line, "something follows the end of the list; give one list only")


def parse(text: str) -> Any:
    """The JSON value that `text` is. Raises `ValueError` that says what is wrong with it."""
    start = _after_blank(text, 0)
    value, end = _parse_at(text, start)
    end = _after_blank(text, end)
    if end < len(text):
        raise ValueError(f"not JSON: something follows the record at column {end + 1}")
    return value


def _parse_at(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecordError:
        raise
    except ValueError:  # Python's limit on the digits of a number
        raise ValueError("a number in it has too many digits") from None
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise RecordError(f"the key {twice!r} appears twice in one object; keep one of them")
    return result


def _refuse(name: str) -> NoReturn:
    raise RecordError(f"not JSON: {name} is no number that JSON has")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def _after_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None


def _too_long() -> str:
    return f"the record is longer than {format_size(MAX_RECORD)}; cut it into several"

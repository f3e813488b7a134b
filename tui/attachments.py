"""Text that travels with a message: files that it names and long pieces that were pasted."""

from __future__ import annotations

import codecs
import stat
from typing import TYPE_CHECKING

from localds.units import format_size
from tui.fence import fenced
from tui.literal import literal
from tui.store.records import Attachment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

LIMIT_BYTES = 2 * 1024**2
_BYTES_PER_TOKEN = 4


class AttachmentError(ValueError):
    """A file that cannot be attached; the message says why and what to do."""


def read_attachment(
    path: Path,
    count_tokens: Callable[[str], int],
    limit_bytes: int = LIMIT_BYTES,
    *,
    name: str | None = None,
) -> Attachment:
    """The text file at `path` as an attachment called `name` (by default the file's own name).

    UTF-8, or UTF-16 with a byte order mark. Blocks: call it in a worker. Raises `AttachmentError`
    for what is missing, no regular file, unreadable, no text, or larger than `limit_bytes`.
    """
    name = path.name if name is None else name
    text = _decode(_read(path, name, limit_bytes), name)
    return Attachment(name, text, count_tokens(text))


def pasted_attachment(text: str, number: int, count_tokens: Callable[[str], int]) -> Attachment:
    """A long piece of pasted text as the attachment "pasted text NUMBER"."""
    return Attachment(pasted_name(number), text, count_tokens(text))


def pasted_name(number: int) -> str:
    """What the pasted piece of this number is called."""
    return f"pasted text {number}"


def estimate_tokens(text: str) -> int:
    """A rough count, for the time before a model and its tokenizer are loaded."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)


def compose_message(text: str, attachments: Iterable[Attachment]) -> str:
    """What the model gets: each attachment in a fence below its name, then the user's text."""
    parts = [f"{one_line(a.name)}:\n{fenced(a.text)}" for a in attachments]
    if text:
        parts.append(text)
    return "\n\n".join(parts)


def one_line(name: str) -> str:
    """A name, safe to draw and on one line, whatever characters are in it."""
    return literal(name).replace("\n", "\\n")


def _read(path: Path, name: str, limit_bytes: int) -> bytes:
    shown = one_line(name)
    try:
        status = path.stat()
        _check_kind(status.st_mode, shown)
        with path.open("rb") as file:
            # One byte more than allowed: some files, those in /proc for one, say that they are
            # empty, and others grow.
            content = file.read(limit_bytes + 1) if status.st_size <= limit_bytes else b""
    except FileNotFoundError:
        raise AttachmentError(
            f"cannot attach {shown}: there is no such file; check the path"
        ) from None
    except OSError as error:
        raise AttachmentError(
            f"cannot attach {shown}: it cannot be read ({error.strerror or error}); "
            "check its permissions"
        ) from None
    size = max(status.st_size, len(content))
    if size > limit_bytes:
        raise AttachmentError(
            f"cannot attach {shown}: it has {format_size(size)} and the limit is "
            f"{format_size(limit_bytes)}; attach a part of it"
        )
    return content


def _check_kind(mode: int, shown: str) -> None:
    if stat.S_ISDIR(mode):
        raise AttachmentError(f"cannot attach {shown}: it is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise AttachmentError(
            f"cannot attach {shown}: it is a device or pipe, not a file; copy its content to a file"
        )


def _decode(content: bytes, name: str) -> str:
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise AttachmentError(
            f"cannot attach {one_line(name)}: it is no text in UTF-8 or UTF-16; convert it first"
        )
    return text

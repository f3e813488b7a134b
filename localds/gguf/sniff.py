"""What a file that is not GGUF seems to be, so that the message can say what to do."""

from __future__ import annotations

from typing import Final

_GIT_LFS: Final = b"version https://git-lfs"

_BEGINNINGS: Final = (
    (_GIT_LFS, "a Git LFS pointer, not the file itself; run `git lfs pull` or download it again"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint; unpack or convert it first"),
    (b"\x80\x02", "a Python pickle, such as a PyTorch checkpoint; convert it first"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"lmgg", "a model in a format older than GGUF; fetch a newer file of this model"),
    (b"fmgg", "a model in a format older than GGUF; fetch a newer file of this model"),
    (b"tjgg", "a model in a format older than GGUF; fetch a newer file of this model"),
)


def describe(start: bytes, size: int) -> str:
    """Guess a file of `size` bytes from its first bytes; ends with the remedy."""
    for beginning, description in _BEGINNINGS:
        if start.startswith(beginning):
            return f"it seems to be {description}"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it seems to be a web page, perhaps an error page; download the file again"
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= size - 8:
        return "it seems to be a safetensors checkpoint; convert it to GGUF first"
    if text.startswith(b"{"):
        return "it seems to be JSON text, perhaps an error message; download the file again"
    if not any(start):
        return "it begins with zeros, so the download was probably cut short; download it again"
    return f"it begins with {start[:4]!r} instead of b'GGUF'; name a .gguf file"

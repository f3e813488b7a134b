"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?(?:b|bytes)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a text such as "5GiB", "800M" or "123456"; raises `ValueError` for others."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(
            f"size {text!r} is not understood; write it like 12GiB, 800MB or 500000000"
        )
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_UNITS | _BINARY_UNITS)[unit])


def format_size(size: float) -> str:
    """A size in binary units with three digits: "10.4 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            digits = ".0f" if unit == "B" or size >= 100 else ".3g"
            return f"{size:{digits}} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"

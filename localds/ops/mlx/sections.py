"""Kernel sources, in files of which a kernel gets some sections.

A line "//// name" begins a section; what comes before the first is for the reader.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files


@cache
def sections(package: str, file: str) -> dict[str, str]:
    """The sections of a file that lies in `package`, by name."""
    text = (files(package) / file).read_text()
    parts = re.split(r"^//// (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))

"""Reading adapters of any form, and naming them on a command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from localds.adapters.adapter import Adapter, AdapterError
from localds.adapters.gguf_file import read_gguf_adapter
from localds.adapters.peft_config import CONFIG_FILE
from localds.adapters.peft_read import WEIGHTS_FILE, read_peft

if TYPE_CHECKING:
    from collections.abc import Iterable

    from localds.adapters.base import Base


def read_adapter(path: str | Path, base: Base) -> Adapter:
    """Read an adapter of `base`: a folder of PEFT, its weights' file, or a GGUF file.

    Raises `AdapterError` for what is no adapter, damaged, or made for another model, `OSError`
    where the disk fails.
    """
    path = Path(path)
    if path.is_dir():
        return read_peft(path, base)
    if not path.exists():
        raise AdapterError(
            f"{path}: there is no such adapter; give a folder with {CONFIG_FILE}, or a GGUF file"
        )
    if path.name == WEIGHTS_FILE:
        return read_peft(path.parent, base)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        return read_gguf_adapter(path, base)
    raise AdapterError(
        f"{path}: it is no adapter; give a folder of PEFT with {CONFIG_FILE} and {WEIGHTS_FILE}, "
        "or a GGUF file (pickled files are not opened: they can run code)"
    )


def parse_adapter(text: str) -> tuple[Path, float]:
    """Read PATH or PATH:SCALE; the scale, 1 by default, is how much of the change is made."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(strength) or not path:
        raise AdapterError(f"adapter {text!r}: write PATH:SCALE with a finite number")
    return Path(path), strength


def read_adapters(
    named: Iterable[tuple[str | Path, float]], base: Base
) -> list[tuple[Adapter, float]]:
    """Read several adapters, each with its strength; see `read_adapter`."""
    return [(read_adapter(path, base), strength) for path, strength in named]

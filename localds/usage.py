"""Which experts of a model were used most, kept from run to run.

A pool that holds only some experts is filled with these first.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from localds.settings import cache_folder, write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from localds.gguf import GGUFFile

_VERSION = 1


def read_usage(gguf: GGUFFile, layers: int, experts: int) -> NDArray[np.uint32] | None:
    """Counts uint32 [layers, experts] of earlier runs; None where there are none to be had."""
    try:
        kept = json.loads(_file(gguf).read_text(encoding="utf-8"))
        if kept["version"] != _VERSION:
            return None
        counts = np.array(kept["counts"], np.uint32)
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return counts if counts.shape == (layers, experts) else None


def keep_usage(gguf: GGUFFile, counts: NDArray[np.uint32]) -> None:
    """Write down counts uint32 [layers, experts]; where that cannot be, they are forgotten."""
    try:
        write_whole(_file(gguf), json.dumps({"version": _VERSION, "counts": counts.tolist()}))
    except OSError:
        return


def _file(gguf: GGUFFile) -> Path:
    return cache_folder() / "usage" / f"{_identity(gguf)}.json"


def _identity(gguf: GGUFFile) -> str:
    """Tells models apart by name and layout, wherever the file lies."""
    facts = [gguf.architecture, gguf.text("general.name", ""), str(gguf.file_bytes)]
    facts += [f"{name} {t.type} {t.shape} {t.offset}" for name, t in gguf.tensors.items()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]

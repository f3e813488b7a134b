"""Biases on the router's choice of experts that training moved: a file beside an adapter's weights.

No form of adapter has a place for them. The file holds the trained biases, float32 [experts] each,
by the names of their GGUF tensors; strengths apply to how far they moved.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from localds.adapters.adapter import AdapterError
from localds.adapters.safetensors import read_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from localds.adapters.adapter import Adapter, Floats
    from localds.adapters.base import Base
    from localds.adapters.merge import Read

BIASES_FILE = "router_biases.safetensors"
_NAME = re.compile(r"blk\.(\d{1,4})\.exp_probs_b\.bias")


def read_biases(folder: Path, base: Base) -> dict[str, Floats]:
    """The biases in an adapter's folder, none where it has no such file.

    Raises `AdapterError` for a file that is damaged or another model's.
    """
    path = folder / BIASES_FILE
    if not path.exists():
        return {}
    stored = read_header(path)
    for name, entry in stored.items():
        _check_place(base, name, entry.shape, str(path))
    biases = {name: entry.read() for name, entry in stored.items()}
    check_biases(base, biases, str(path))
    return biases


def check_biases(base: Base, biases: Mapping[str, Floats], where: str) -> None:
    """Raise `AdapterError` unless the model has all of these biases, and they are finite."""
    for name, bias in biases.items():
        _check_place(base, name, bias.shape, where)
        if not np.isfinite(bias).all():
            raise AdapterError(f"{where}: {name} has values that are no numbers; train it again")


def _check_place(base: Base, name: str, shape: tuple[int, ...], where: str) -> None:
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= base.layers or name not in base.shapes:
        raise AdapterError(
            f"{where}: it has {name[:120]!r}, which is no bias of the router of {base.name}; it "
            "belongs to another model"
        )
    if shape != base.shapes[name]:
        raise AdapterError(
            f"{where}: {name} has shape {shape}, and {base.name} needs {base.shapes[name]}; it "
            "belongs to another model"
        )


class BiasPatch:
    """What adapters do to the bias of one router: how far each moved it, by its strength."""

    turned = False

    def __init__(self, tensor: str, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self._moved = [
            (adapter.biases[tensor], strength)
            for adapter, strength in adapters
            if tensor in adapter.biases
        ]

    def rows(self, read: Read, matrix: int, start: int, stop: int) -> Floats:
        """The adapted bias as one row; `read` gives the base's."""
        # In float64, so that a whole change gives the trained bias to the bit.
        base = read(matrix, start, stop).astype(np.float64)
        changes = (strength * (trained - base) for trained, strength in self._moved)
        with np.errstate(over="ignore"):
            return (base + sum(changes)).astype(np.float32)

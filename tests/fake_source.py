"""A model to convert that is computed, not stored: any size, the same values every time."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from convert.source import Source, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from convert.source import Value

SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (320, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_output.weight": (64, 96),
    "blk.0.ffn_down_exps.weight": (4, 64, 32),
    "blk.0.ffn_up_exps.weight": (4, 32, 64),
    "output_norm.weight": (64,),
    "output.weight": (320, 64),
}
METADATA: Mapping[str, Value] = {"general.name": "fake", "fake.words": ["a", "b"], "fake.size": 7}


def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    raw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return raw.standard_normal(shape, np.float32)


def fake_source(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    change: Callable[[str, int, int, NDArray[np.float32]], NDArray[np.float32]] | None = None,
) -> Source:
    """A source whose folder holds one file that stands for its weights.

    `change(name, matrix, first row, rows)` may replace what is read, or wait, or raise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights.write_bytes(b"weights")

    def target(name: str, shape: tuple[int, ...]) -> Target:
        def read(matrix: int, start: int, stop: int) -> NDArray[np.float32]:
            data = values(f"{name}.{matrix}", (shape[-2] if len(shape) > 1 else 1, shape[-1]))
            rows = data[start:stop]
            return rows if change is None else change(name, matrix, start, rows)

        count = int(np.prod(shape))
        return Target(name, shape, "BF16", 2 * count, read, (f"model.{name}",))

    targets = [target(name, shape) for name, shape in shapes.items()]
    return Source(folder, "deepseek2", dict(METADATA), targets, [])

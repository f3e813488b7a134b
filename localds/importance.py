"""Importance matrices: how much each column of each weight matters, seen from a text.

Quantization then rounds the columns that meet large inputs with more care. The file is the GGUF
form that llama.cpp's imatrix program writes and its quantizer reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds import models, windows
from localds.gguf.write import write_gguf
from localds.ops.cpu import CpuOps
from localds.ops.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localds.gguf.write import WritableValue
    from localds.model import Model
    from localds.ops.recording import InputSums
    from localds.windows import Windows

# Larger sums would be infinite in the file.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Unreached:
    """Experts of layer `layer` that no token was sent to: their ids, of `total`."""

    layer: int
    experts: list[int]
    total: int


class Collector:
    """Runs windows of tokens through a model and sums what its weights are multiplied with.

    Each column of a weight takes 8 bytes: some 0.5% of what a large model's experts take in four
    bits. With `output_weight` the output matrix (where there is none, the embedding that stands in
    for it) is recorded, too, which costs a product with the whole vocabulary.
    """

    def __init__(self, model: Model, *, output_weight: bool = False) -> None:
        self.chunks = 0
        self._output_weight = output_weight
        self._recording = Recording()
        self._decoder = models.build(model.gguf, CpuOps(self._recording, model.experts))

    def run(self, text: Windows) -> Iterator[int]:
        """Read `text`, yielding the number of windows read so far after each.

        An interrupted run leaves part of a window in the sums of the first layers; that does no
        harm, for every weight has counts of its own. Raises `ValueError` where inputs are not
        finite, naming the weight.
        """
        for states in windows.states(self._decoder, text):
            if self._output_weight:
                for start in range(0, len(states), 64):
                    self._decoder.head(states[start : start + 64], last_only=False)
            self._check()
            self.chunks += 1
            yield self.chunks

    def sums(self) -> dict[str, InputSums]:
        """The sums so far, by tensor name."""
        return self._recording.sums()

    def unreached(self) -> list[Unreached]:
        """The layers with experts that the text never reached."""
        found = []
        for name, sums in self.sums().items():
            if name.endswith(".ffn_down_exps.weight") and not sums.counts.all():
                ids = np.flatnonzero(sums.counts == 0).tolist()
                found.append(Unreached(int(name.split(".")[1]), ids, len(sums.counts)))
        return found

    def _check(self) -> None:
        for name, sums in self.sums().items():
            if not sums.squares.sum() <= _LARGEST:
                raise ValueError(
                    f"the inputs of {name} are not finite in chunk {self.chunks + 1}; "
                    "look for damaged weights with `localds inspect --check`"
                )


def save(path: Path, sums: dict[str, InputSums], *, dataset: str, chunks: int, size: int) -> None:
    """Write the GGUF form, replacing `path` only when it is complete.

    `dataset` names the text, of which `chunks` windows of `size` tokens were read. Per weight NAME,
    the file holds `NAME.in_sum2` {columns, matrices} and `NAME.counts` {1, matrices}, both F32.
    Heads, which every token reaches, are one row of columns * heads with one count.
    """
    metadata: dict[str, WritableValue] = {
        "general.type": "imatrix",
        "imatrix.datasets": [dataset],
        "imatrix.chunk_count": chunks,
        "imatrix.chunk_size": size,
    }
    tensors = {}
    for name in sorted(sums):
        squares, counts = sums[name].squares, sums[name].counts
        if name.endswith((".attn_k_b.weight", ".attn_v_b.weight")):
            squares, counts = squares.reshape(1, -1), counts[:1]
        tensors[name + ".in_sum2"] = squares.astype(np.float32)
        tensors[name + ".counts"] = counts.astype(np.float32).reshape(-1, 1)
    write_gguf(path, metadata, tensors)

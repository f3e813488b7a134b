"""The micro-batches of a training run: any of them can be made at once, always the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds.finetune.data.batch import Batch, build_batch, padded, width_for
from localds.finetune.data.packing import Rows, group, pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from localds.finetune.data.examples import Examples


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run: `length` positions in a row, `rows` in a micro-batch."""

    length: int
    rows: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.rows < 1:
            raise ValueError(f"a stage of {self.rows} rows of {self.length}: both must be above 0")


class Batches:
    """A sequence of `Batch`, the same for the same examples, stages and seed.

    Each stage has an equal share of the steps, and its own epochs: passes over the examples that
    fit into its rows, packed anew in every one; longer ones wait for a later stage. The last
    micro-batch of an epoch may have fewer rows. Without `packing` a row has one example, and a
    batch is as wide as its longest needs.

    `len` is the number of micro-batches: `steps`, which may be set, or as many as make `epochs`
    passes, all stages together (a pass in a stage of a third of the steps counts as its part).
    Indexing beyond it goes on with the last stage. Raises `ValueError` where no example fits into a
    stage, or one is longer than the last stage's rows.
    """

    def __init__(
        self,
        examples: Examples,
        stages: Sequence[Stage],
        *,
        seed: int = 0,
        packing: bool = True,
        epochs: float = 1.0,
        steps: int | None = None,
    ) -> None:
        if not len(examples) or not stages:
            raise ValueError("batches need at least one example and one stage")
        if [stage.length for stage in stages] != sorted(stage.length for stage in stages):
            raise ValueError("the lengths of a curriculum must not fall")
        if epochs <= 0 or (steps is not None and steps < 1):
            raise ValueError(f"a run of {epochs} epochs or {steps} steps: it must be above 0")
        self._passes = [
            _Passes(examples, stage, seed, number, packing, last=stage is stages[-1])
            for number, stage in enumerate(stages)
        ]
        self.steps = self.count_steps(epochs) if steps is None else steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        number, within = self._locate(step)
        return self._passes[number].batch(within)

    def stage_at(self, step: int) -> int:
        """Number of the stage that a step is in."""
        return self._locate(step)[0]

    def epoch_at(self, step: int) -> float:
        """Passes over the stage's examples that are done before a step, within its stage."""
        number, within = self._locate(step)
        return self._passes[number].epochs_before(within)

    def start_of(self, stage: int) -> int:
        """The first step of a stage."""
        return self.steps * stage // len(self._passes)

    def _locate(self, step: int) -> tuple[int, int]:
        if step < 0:
            raise IndexError(f"step {step}: steps count from 0")
        last = len(self._passes) - 1
        number = next((s for s in range(last) if step < self.start_of(s + 1)), last)
        return number, step - self.start_of(number)

    def count_steps(self, epochs: float) -> int:
        """Micro-batches of so many epochs."""
        if len(self._passes) == 1:
            return self._passes[0].count_steps(epochs)
        # In each stage a step is a part of a pass; their sum over all stages is to be `epochs`.
        parts = sum(1 / passes.count_steps(1) for passes in self._passes)
        return max(len(self._passes), round(epochs * len(self._passes) / parts))


class _Passes:
    """The epochs of one stage, of which one is in memory."""

    def __init__(
        self,
        examples: Examples,
        stage: Stage,
        seed: int,
        number: int,
        packing: bool,
        *,
        last: bool,
    ) -> None:
        # The last token of an example is no input.
        sizes = examples.lengths - 1
        if last and sizes.max() > stage.length:
            raise ValueError(
                f"an example needs {sizes.max():,} positions, and the last rows have "
                f"{stage.length:,}; encode with this length, or choose longer rows"
            )
        fitting = np.flatnonzero(sizes <= stage.length)
        if not len(fitting):
            raise ValueError(
                f"no example fits into rows of {stage.length}; the shortest needs {sizes.min():,}, "
                "so begin the curriculum there"
            )
        self._examples = examples if len(fitting) == len(sizes) else examples.subset(fitting)
        self._sizes = sizes[fitting]
        self._stage, self._key, self._packing = stage, (seed, number), packing
        self._starts = [0]  # first step of each epoch that was counted
        self._epoch, self._batches = -1, list[Rows]()

    def batch(self, step: int) -> Batch:
        """The micro-batch at a step of the stage."""
        epoch = self._epoch_of(step)
        rows = self._packed(epoch)[step - self._starts[epoch]]
        length = self._stage.length
        used = max(int(self._sizes[row].sum()) for row in rows)
        width = width_for(used, length) if self._packing else padded(used, length)
        return build_batch(self._examples, rows, width)

    def epochs_before(self, step: int) -> float:
        """Epochs until a step."""
        epoch = self._epoch_of(step)
        start, end = self._starts[epoch : epoch + 2]
        return epoch + (step - start) / (end - start)

    def count_steps(self, epochs: float) -> int:
        """Steps of that many epochs, the last one maybe a part."""
        whole = int(epochs)
        while len(self._starts) <= whole:
            self._count_next()
        part = epochs - whole
        if not part:
            return self._starts[whole]
        if len(self._starts) == whole + 1:
            self._count_next()
        start, end = self._starts[whole : whole + 2]
        return max(1, round(start + part * (end - start)))

    def _epoch_of(self, step: int) -> int:
        while step >= self._starts[-1]:
            self._count_next()
        return int(np.searchsorted(self._starts, step, side="right")) - 1

    def _count_next(self) -> None:
        """Packing has to be done to know how many rows it makes."""
        self._starts.append(self._starts[-1] + len(self._packed(len(self._starts) - 1)))

    def _packed(self, epoch: int) -> list[Rows]:
        if epoch != self._epoch:
            key, length, count = (*self._key, epoch), self._stage.length, self._stage.rows
            if self._packing:
                rows = pack(self._sizes, length, *key)
                self._batches = [rows[at : at + count] for at in range(0, len(rows), count)]
            else:
                self._batches = group(self._sizes, length, count, *key)
            self._epoch = epoch
        return self._batches

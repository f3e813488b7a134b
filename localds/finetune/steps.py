"""The batches of a run by its optimizer steps, as the training loop asks for them."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from localds.finetune.data import Batches, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localds.finetune.data import Batch, Examples


class StepBatches:
    """`accumulation` micro-batches a step, for `steps` steps or as many as `epochs` take.

    See `localds.finetune.data.Batches`. Raises `ValueError` as that does.
    """

    def __init__(
        self,
        examples: Examples,
        stages: Sequence[Stage],
        *,
        accumulation: int,
        seed: int,
        packing: bool,
        epochs: float,
        steps: int | None,
    ) -> None:
        self._batches = Batches(examples, stages, seed=seed, packing=packing)
        self.steps_per_epoch = math.ceil(len(self._batches) / accumulation)
        if steps is None:
            steps = math.ceil(self._batches.count_steps(epochs) / accumulation)
        self._batches.steps = steps * accumulation
        self.steps = steps
        self.fingerprint = _fingerprint(examples, stages, accumulation, seed, packing)
        self._stages = tuple(stages)
        self._accumulation = accumulation

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` of a step."""
        return self._batches[step * self._accumulation + micro]

    def length_at(self, step: int) -> int:
        """The length of the rows in a step."""
        return self._stages[self._batches.stage_at(step * self._accumulation)].length


class HeldOut:
    """The examples that are evaluated, each once, in batches of `stage`."""

    def __init__(self, examples: Examples, stage: Stage, *, packing: bool) -> None:
        self.fingerprint = _fingerprint(examples, [stage], 1, 0, packing)
        self._batches = Batches(examples, [stage], packing=packing)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        return self._batches[index]


def _fingerprint(
    examples: Examples, stages: Sequence[Stage], accumulation: int, seed: int, packing: bool
) -> str:
    """Tells the examples and their order from all others, in hex."""
    digest = hashlib.sha256(f"{stages!r} {accumulation} {seed} {packing}".encode())
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.ids.tobytes())
        digest.update(example.trained.tobytes())
    return digest.hexdigest()

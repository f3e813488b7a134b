"""Short training runs whose losses are known from PEFT: cases, their data, and ours of each.

Weights, first adapters and data come from `checkpoints.uniform`, so that every machine has the
same. A model is a golden variant, perhaps with changes to its config, in an F32 file or quantized.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from checkpoints import (
    GOLDEN,
    VARIANTS,
    VOCABULARY,
    golden_config,
    golden_shapes,
    make_weights,
    uniform,
    write_checkpoint,
)

from convert import convert
from convert.open import open_checkpoint
from localds.finetune.config import AdapterConfig
from localds.finetune.data import Batch
from localds.gguf import GGUFFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from localds.finetune.config import Method

CURVES = GOLDEN / "finetune"
STEPS = 30
WARMUP_STEPS = 3
BATCHES = 3
ROWS, WIDTH = 2, 32


@dataclass(frozen=True)
class Base:
    """A model: the variant whose class it has, the folder with its config, the file's recipe."""

    variant: str
    golden: str
    recipe: str = "F32"


BASES = {
    "v2-lite": Base("v2-lite", "v2-lite"),
    "v2": Base("v2", "v2"),
    "v3": Base("v3", "v3"),
    "mixtral": Base("mixtral", "mixtral"),
    "v2-lite Q8_0": Base("v2-lite", "v2-lite", "Q8_0"),
    "mixtral Q8_0": Base("mixtral", "mixtral", "Q8_0"),
    "v3 Q4_K_M": Base("v3", "finetune/v3-wide", "Q4_K_M"),
}
WIDE = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
}
"""The changes to "v3" in finetune/v3-wide: rows of whole blocks of Q4_K."""

FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = {
    "v2-lite": ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "v2": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
DENSE = {name: () if name == "mixtral" else FFN for name in ATTENTION}


@dataclass(frozen=True)
class Case:
    """One run. `fresh`: B begins as zeros, as usual; else all gradients count from the first.

    `seed` is that of the first adapters and of the data.
    """

    base: str
    targets: tuple[str, ...]
    method: Method = "lora"
    fresh: bool = False
    seed: int = 11
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    clip: float | None = 1.0
    packed: bool = True
    aux_alpha: float = 0.0

    @property
    def name(self) -> str:
        chosen = self.targets[0] if len(self.targets) == 1 else f"{len(self.targets)} targets"
        return f"{self.base}, {self.method}, {chosen}{', fresh' if self.fresh else ''}"

    @property
    def config(self) -> AdapterConfig:
        return AdapterConfig(rank=4, alpha=8.0, method=self.method, targets=self.targets)

    def rate(self, step: int) -> float:
        return self.learning_rate * min(1.0, (step + 1) / (WARMUP_STEPS + 1))


SLOW = 2e-3
"""A learning rate for many adapters at once, at which rounding errors stay small."""


def _cases() -> list[Case]:
    cases = []
    for name, attention in ATTENTION.items():
        plain = (*attention, *DENSE[name])
        everything = (*plain, "experts", "router")
        cases += [Case(name, (target,)) for target in everything]
        cases += [Case(name, (target,), "dora") for target in plain]
        cases += [
            Case(name, everything, learning_rate=SLOW, weight_decay=0.1, clip=None),
            Case(name, everything, fresh=True, learning_rate=SLOW),
            Case(name, everything, "rslora", fresh=True, learning_rate=SLOW),
            Case(name, plain, "dora", fresh=True, learning_rate=SLOW, weight_decay=0.1),
        ]
    for name in ("v2-lite Q8_0", "mixtral Q8_0", "v3 Q4_K_M"):
        plain = ATTENTION[BASES[name].variant] + DENSE[BASES[name].variant]
        everything = (*plain, "experts", "router")
        cases += [
            Case(name, everything, learning_rate=SLOW),
            Case(name, plain, "dora", learning_rate=SLOW),
        ]
    return cases


CASES = {case.name: case for case in _cases()}


def stored_case(name: str) -> tuple[Case, dict[str, Any]]:
    """A case with the seed of its curve, and the curve."""
    curve = stored_curves()[name]
    return replace(CASES[name], seed=curve["seed"]), curve


@cache
def stored_curves() -> dict[str, dict[str, Any]]:
    """All curves, by the names of cases."""
    curves: dict[str, dict[str, Any]] = json.loads((CURVES / "curves.json").read_text())
    return curves


# ---- models ----


def write_base(name: str, folder: Path) -> Path:
    """The checkpoint of a base, in float32."""
    base = BASES[name]
    weights = make_weights(golden_shapes(base.golden), VARIANTS[base.variant].seed)
    return write_checkpoint(folder, golden_config(base.golden), weights)


def write_gguf(name: str, folder: Path) -> Path:
    """The file of a base."""
    path = folder / f"{name}.gguf"
    base = BASES[name]
    source = open_checkpoint(
        write_base(name, folder / f"{name}.base"), pre=VARIANTS[base.variant].pre
    )
    convert(source, path, recipe=base.recipe, force=True)
    return path


def ggufs(folder: Path) -> Callable[[str], Path]:
    """Files of bases in a folder, each made once."""
    return cache(lambda name: write_gguf(name, folder))


# ---- data ----


def sequences(case: Case, number: int, row: int) -> list[tuple[list[int], list[float]]]:
    """The examples of a row of a batch: ids, and for each whether it is to be predicted."""
    lengths = (13, 12) if row else (21, 8)
    if not case.packed:
        lengths = (WIDTH + 1,)
    found = []
    for index, length in enumerate(lengths):
        values = uniform(case.seed, f"data {number} {row} {index}", (length,))
        ids = ((values + 1) / 2 * VOCABULARY).astype(int).tolist()
        prompt = length // 4
        found.append((ids, [0.0] * prompt + [1.0] * (length - prompt)))
    return found


def make_batch(case: Case, number: int) -> Batch:
    """The rows of a batch, with padding at the end of packed ones."""
    ints = [np.zeros((ROWS, WIDTH), np.int32) for _ in range(4)]
    batch = Batch(ints[0], ints[1], np.zeros((ROWS, WIDTH), np.float32), ints[2], ints[3])
    for row in range(ROWS):
        at = 0
        for index, (ids, weights) in enumerate(sequences(case, number, row)):
            end = at + len(ids) - 1
            batch.ids[row, at:end] = ids[:-1]
            batch.targets[row, at:end] = ids[1:]
            batch.weights[row, at:end] = weights[1:]
            batch.segments[row, at:end] = index + 1
            batch.positions[row, at:end] = np.arange(end - at)
            at = end
    return batch


@dataclass(frozen=True)
class CaseBatches:
    """A case's batches, over and over."""

    case: Case
    fingerprint: str = "data"
    steps_per_epoch: int = BATCHES

    def batch(self, step: int, micro: int) -> Batch:  # noqa: ARG002
        return make_batch(self.case, step % BATCHES)

    def length_at(self, step: int) -> int:  # noqa: ARG002
        return WIDTH


# ---- our run ----

Tree = dict[str, dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]]


class CaseModel:
    """A `TrainModel` as the loop takes it, with the case's first adapters."""

    fingerprint = "model"

    def __init__(self, case: Case, gguf: GGUFFile) -> None:
        import mlx.core as mx

        from localds.finetune.model import TrainModel
        from localds.ops.mlx.backend import PORTABLE

        self._mx = mx
        self._case = case
        stream = mx.new_thread_unsafe_stream(mx.cpu)
        self.model = TrainModel(gguf, case.config, PORTABLE, stream, aux_alpha=case.aux_alpha)
        self.value_and_grad = self.model.value_and_grad
        self.evaluate = self.model.evaluate

    def init(self, seed: int) -> Any:  # noqa: ARG002
        mx = self._mx
        return {
            name: {leaf: mx.array(array) for leaf, array in leaves.items()}
            for name, leaves in self.first.items()
        }

    @cached_property
    def first(self) -> Tree:
        """The first adapters."""
        found: Tree = {}
        for name, leaves in self.model.init(0).items():
            found[name] = {leaf: self._first(name, leaf, np.array(leaves[leaf])) for leaf in leaves}
        return found

    def _first(self, name: str, leaf: str, usual: Any) -> Any:
        values = uniform(self._case.seed, f"{name}.{leaf}", usual.shape)
        if leaf == "a":
            return values / np.float32(np.sqrt(usual.shape[-1]))
        if self._case.fresh:
            return usual
        return values * np.float32(0.05) if leaf == "b" else usual * (1 + values / 10)


@dataclass(frozen=True)
class Curve:
    """A run: the loss of each step, and the adapters at its ends."""

    losses: list[float]
    first: Tree
    last: Tree

    def moved(self) -> dict[str, list[float]]:
        """Of each array, how far it went, and how far along a fixed direction."""
        found = {}
        for name, leaves in self.last.items():
            for leaf, array in leaves.items():
                way = (array - self.first[name][leaf]).astype(np.float64)
                direction = uniform(0, f"{name}.{leaf}", way.shape) / np.sqrt(way.size)
                found[f"{name}.{leaf}"] = [
                    float(np.linalg.norm(way)),
                    float((way * direction).sum()),
                ]
        return found


def train(case: Case, path: Path, folder: Path) -> Curve:
    """Run a case on the file at `path` by our loop, in an empty folder."""
    from localds.finetune.loop import StepDone, Trainer, TrainSettings

    settings = TrainSettings(
        steps=STEPS,
        learning_rate=case.learning_rate,
        schedule="constant",
        warmup=WARMUP_STEPS / STEPS,
        weight_decay=case.weight_decay,
        clip=case.clip,
    )
    losses: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    with GGUFFile.open(path) as gguf:
        model = CaseModel(case, gguf)
        result = Trainer(model, CaseBatches(case), None, settings, folder, note).run()
    last = {
        name: {leaf: np.array(array) for leaf, array in leaves.items()}
        for name, leaves in result.params.items()
    }
    return Curve(losses, model.first, last)


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Of two curves."""
    return float(np.abs(np.array(found) - np.array(expected)).max())


def largest_drift(found: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> float:
    """Of two runs' `moved`, in shares of the way of each array."""
    assert found.keys() == expected.keys()
    return max(
        largest_difference(found[name], way) / max(way[0], 1e-6) for name, way in expected.items()
    )

"""`fit:SIZE`: a type for every tensor, so that the file has a given size and errs least.

What counts is the relative error of a tensor's outputs, sum(importance * error^2) over
sum(importance * weight^2), measured on a sample of its rows in each type. Every block adds its
share to the residual stream, so the tensors of all blocks count the same, whatever their size;
the experts' share of a layer is half where shared experts run beside them. The output matrix acts
on the whole stream and counts as half of all layers. Small tensors that every token uses thereby
get many bits, the experts, which make up the file, few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from convert.presets import is_quantized, unquantized_type
from localds import _native
from localds.gguf import GGMLType
from localds.gguf.write import TensorInfo, lay_out
from localds.units import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from convert.pipeline import Importance
    from convert.source import Source, Target

PREFIX = "fit:"
CANDIDATES = (
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.IQ4_XS,
    GGMLType.IQ4_NL,
    GGMLType.Q4_K,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
    GGMLType.Q8_0,
    GGMLType.BF16,
)
SAMPLE_ELEMENTS = 1 << 18
SAMPLE_MATRICES = 8


@dataclass(frozen=True, slots=True)
class Option:
    """A type for one tensor: the bytes that it takes and the error that it costs."""

    kind: GGMLType
    nbytes: int
    error: float


def is_fit(recipe: str) -> bool:
    """Whether a recipe is a size to meet."""
    return recipe.lower().startswith(PREFIX)


def fit_types(
    source: Source,
    recipe: str,
    kept: Sequence[GGMLType | None],
    importance: Importance | None,
) -> list[GGMLType]:
    """Types for the tensors of a model, so that the file has at most the size after `fit:`.

    `kept` are types that are settled already. Raises `ValueError` for a size that is malformed or
    too small.
    """
    size = parse_size(recipe[len(PREFIX) :])
    options = [
        _options(source, target, kind, importance)
        for target, kind in zip(source.targets, kept, strict=True)
    ]
    smallest = [choices[0].kind for choices in options]
    room = size - _file_bytes(source, smallest)
    if room < 0:
        raise ValueError(
            f"--type {recipe}: the smallest file of this model has "
            f"{format_size(_file_bytes(source, smallest))}; ask for at least that"
        )
    return [choice.kind for choice in best_choices(options, room)]


def best_choices(options: Sequence[Sequence[Option]], room: int) -> list[Option]:
    """One option of each tensor, starting from the first ones, with `room` more bytes to spend.

    Options are convex: each step to the next costs more bytes for what it gains. So the steps are
    taken in the order of their gain per byte, over all tensors, as far as they fit.
    """
    chosen = [0] * len(options)
    steps = sorted(
        (-_gain(before, after), tensor, index)
        for tensor, choices in enumerate(options)
        for index, (before, after) in enumerate(pairwise(choices))
    )
    for _, tensor, index in steps:
        cost = options[tensor][index + 1].nbytes - options[tensor][index].nbytes
        if chosen[tensor] == index and cost <= room:
            chosen[tensor] = index + 1
            room -= cost
    return [choices[index] for choices, index in zip(options, chosen, strict=True)]


def convex(options: Sequence[Option]) -> list[Option]:
    """The options on the lower hull of error over bytes, smallest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option) -> float:
    """Error saved per byte."""
    return (before.error - after.error) / max(after.nbytes - before.nbytes, 1)


def _options(
    source: Source, target: Target, kept: GGMLType | None, importance: Importance | None
) -> list[Option]:
    if not is_quantized(target):
        kept = unquantized_type(source, target)
    if kept is not None:
        return [Option(kept, _nbytes(target, kept), 0.0)]
    kinds = [kind for kind in CANDIDATES if target.columns % kind.block_elements == 0]
    sample = _sample(target, importance)
    weight = _weight(source, target)
    return convex(
        [
            Option(kind, _nbytes(target, kind), weight * _relative_error(sample, kind))
            for kind in kinds or [GGMLType.F16]
        ]
    )


Sample = list[tuple["NDArray[np.float32]", "NDArray[np.float32] | None"]]
"""Rows [n, columns] of single matrices, each with its importance [columns] or None."""


def _sample(target: Target, importance: Importance | None) -> Sample:
    """Rows out of the middle of matrices that are spread over the tensor."""
    weights = None if importance is None else importance.of(target)
    count = min(target.matrices, SAMPLE_MATRICES)
    rows = min(target.rows, max(1, SAMPLE_ELEMENTS // (count * target.columns)))
    first = (target.rows - rows) // 2
    sample: Sample = []
    for index in range(count):
        matrix = (2 * index + 1) * target.matrices // (2 * count)
        data = np.ascontiguousarray(target.read(matrix, first, first + rows))
        row = None if weights is None else np.ascontiguousarray(weights[matrix])
        sample.append((data, row))
    return sample


def _relative_error(sample: Sample, kind: GGMLType) -> float:
    error = total = 0.0
    for data, weights in sample:
        blocks = _native.quantize(kind, data, weights).reshape(-1)
        back = _native.dequantize(_native.Matrix(kind, len(data), data.shape[1], 1, blocks))[0]
        factor = np.float32(1) if weights is None else weights
        error += float((np.square(data - back) * factor).sum(dtype=np.float64))
        total += float((np.square(data) * factor).sum(dtype=np.float64))
    return error / total if total > 0 else 0.0


def _weight(source: Source, target: Target) -> float:
    """How much a tensor's relative error counts."""
    layers = source.metadata.get(f"{source.architecture}.block_count", 1)
    names = {other.name for other in source.targets}
    if target.name == "output.weight" or (
        target.name == "token_embd.weight" and "output.weight" not in names
    ):
        return max(1.0, layers / 2) if isinstance(layers, int) else 1.0
    if "_exps." in target.name:
        return 0.5 if target.name.replace("_exps.", "_shexp.") in names else 1.0
    return 0.5 if "_shexp." in target.name else 1.0


def _nbytes(target: Target, kind: GGMLType) -> int:
    """Bytes in the file, padding included."""
    nbytes = math.prod(target.shape) // kind.block_elements * kind.block_bytes
    return -(-nbytes // 32) * 32


def _file_bytes(source: Source, types: Sequence[GGMLType]) -> int:
    infos = [
        TensorInfo(target.name, target.shape, kind)
        for target, kind in zip(source.targets, types, strict=True)
    ]
    # Room for the keys that the recipe adds: the importance matrix's name among them.
    return lay_out({**source.metadata, "general.file_type": 0}, infos).size + 4096

"""Functions of tokens that keep much for their gradient, computed for some tokens at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.limits import KEPT_BYTES
from localds.finetune.model.adapter import Trained
from localds.finetune.model.gradients import with_vjp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from localds.finetune.model.adapter import Parameters

    Function = Callable[[slice, Sequence[mx.array], Trained], mx.array]


def token_slices(n: int, token_bytes: int) -> list[slice]:
    """Slices of n tokens, as large and as even as can be, if so much is kept of each token."""
    count = -(-n // max(KEPT_BYTES // token_bytes, 1))
    step = -(-n // count)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def in_slices(
    function: Function, slices: list[slice], rows: list[mx.array], trained: Trained
) -> mx.array:
    """`function(slice, rows, trained)` of each slice of the rows [n, ...], joined.

    Differentiable in the rows and the parameters. Of several slices one is done before the next
    begins, and nothing but the rows is kept: the gradient computes each slice again. What drops out
    is drawn for each slice.
    """
    if len(slices) == 1:
        return function(slices[0], rows, trained)
    count = len(rows)
    keys = _dropout(trained.dropout, len(slices))

    def compute(index: int, *given: mx.array) -> mx.array:
        mine = Trained(_like(trained.parameters, given[count:]), keys[index])
        return function(slices[index], given[:count], mine)

    def forward(given: list[mx.array]) -> mx.array:
        found: list[mx.array] = []
        for index in range(len(slices)):
            found.append(compute(index, *_after(_part(given, index), found[-1:])))
        return mx.concatenate(found)

    def backward(given: list[mx.array], dy: mx.array, __: mx.array) -> list[mx.array]:
        of_rows: list[list[mx.array]] = []
        slopes: list[mx.array] = []
        for index, here in enumerate(slices):
            before = [*of_rows[-1], *slopes] if of_rows else []
            waiting = _after([*_part(given, index), dy[here]], before)
            _, found = mx.vjp(partial(compute, index), waiting[:-1], waiting[-1:])
            of_rows.append(found[:count])
            more = found[count:]
            slopes = [a + b for a, b in zip(slopes, more, strict=True)] if slopes else more
        return [*(mx.concatenate(list(parts)) for parts in zip(*of_rows, strict=True)), *slopes]

    def _part(given: list[mx.array], index: int) -> list[mx.array]:
        return [*(array[slices[index]] for array in given[:count]), *given[count:]]

    flat = [array for values in trained.parameters.values() for array in values.values()]
    return with_vjp(forward, backward)([*rows, *flat])


def _after(arrays: list[mx.array], before: list[mx.array]) -> list[mx.array]:
    """The arrays, once those before are there."""
    return mx.depends(arrays, before) if before else arrays


def _like(parameters: Parameters, arrays: Sequence[mx.array]) -> Parameters:
    rest = iter(arrays)
    return {name: {kind: next(rest) for kind in values} for name, values in parameters.items()}


def _dropout(keys: mx.array | None, count: int) -> list[mx.array | None]:
    """Keys for each of several slices: with the same ones, the same places would drop out."""
    if keys is None:
        return [None] * count
    drawn = mx.random.split(keys[0], count * len(keys)).reshape(count, *keys.shape)
    return [drawn[index] for index in range(count)]

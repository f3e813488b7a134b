"""How pairs of fused experts and of rotated projections are laid out, here and elsewhere.

PEFT adapts transformers' stack of experts [experts, out, in] by A [experts * rank, in], the rank
running faster, and B [out, rank * experts], the expert running faster. Gate and up are one matrix
there, gate's rows first: two pairs become one of their ranks' sum, whose B is block diagonal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from localds.adapters.adapter import Floats, Pair


def fuse(gate: Pair | None, up: Pair | None, rows: int) -> Pair:
    """One stacked pair for [gate; up], each of `rows` rows; a missing one stays unchanged."""
    halves = [(half, place) for place, half in enumerate((gate, up)) if half is not None]
    a = np.concatenate([half["a"] for half, _ in halves], axis=1)
    b = np.zeros((a.shape[0], 2 * rows, a.shape[1]), np.float32)
    column = 0
    for half, place in halves:
        rank = half["a"].shape[1]
        b[:, place * rows : (place + 1) * rows, column : column + rank] = half["b"]
        column += rank
    return {"a": a, "b": b}


def unfuse(pair: Pair) -> tuple[Pair | None, Pair | None]:
    """The pairs of gate and of up; None for one that is not adapted.

    Where B is block diagonal each has half the rank, as before `fuse`.
    """
    a, b = pair["a"], pair["b"]
    rows, rank = b.shape[1] // 2, a.shape[1]
    half = rank // 2
    upper, lower = b[:, :rows], b[:, rows:]
    if rank % 2 == 0 and not upper[:, :, half:].any() and not lower[:, :, :half].any():
        return _pair(a[:, :half], upper[:, :, :half]), _pair(a[:, half:], lower[:, :, half:])
    return (
        _pair(a, upper) if upper.any() else None,
        _pair(a, lower) if lower.any() else None,
    )


def flatten(pair: Pair) -> tuple[Floats, Floats]:
    """A and B of stacked experts in PEFT's two dimensions."""
    a, b = pair["a"], pair["b"]
    return (
        np.ascontiguousarray(a.reshape(-1, a.shape[-1])),
        np.ascontiguousarray(b.transpose(1, 2, 0).reshape(b.shape[1], -1)),
    )


def unflatten(a: Floats, b: Floats, experts: int) -> Pair:
    """The opposite of `flatten`."""
    stacked = b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
    return _pair(a.reshape(experts, -1, a.shape[-1]), stacked)


def interleave(rows: Floats, heads: int) -> Floats:
    """Reorder each head's rows: values that are rotated together, in halves, become adjacent."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def deinterleave(rows: Floats, heads: int) -> Floats:
    """The opposite of `interleave`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _pair(a: Floats, b: Floats) -> Pair:
    return {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}

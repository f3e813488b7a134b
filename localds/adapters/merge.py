"""Weights with adapters in them: W + scale * B A, of DoRA with each row brought to its length."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from localds.adapters.adapter import AdapterError
from localds.adapters.biases import BiasPatch, check_biases
from localds.adapters.names import FUSED, GATE, UP, split_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from localds.adapters.adapter import Adapter, Floats, Pair, Tree
    from localds.adapters.base import Base

    Read = Callable[[int, int, int], Floats]
    """Rows start to stop of a matrix of a tensor, float32 [rows, columns]."""


def merged(values: Floats, pair: Pair, scale: float, strength: float = 1.0) -> Floats:
    """The matrix `values` [out, in] adapted by one pair; a new array.

    `strength` is how much of the change is made: 0 is none. Of LoRA it multiplies B A; of DoRA,
    which is no sum, the difference between the matrix before and after.
    """
    return values + _change(values, pair, scale, strength)


def _change(values: Floats, pair: Pair, scale: float, strength: float) -> Floats:
    if "m" not in pair:
        product: Floats = np.matmul(pair["b"] * np.float32(scale * strength), pair["a"])
        return product
    changed: Floats = np.matmul(pair["b"] * np.float32(scale), pair["a"])
    changed += values
    lengths = np.sqrt(np.square(changed, dtype=np.float64).sum(axis=1))
    factors = np.divide(pair["m"], lengths, out=np.zeros_like(lengths), where=lengths > 0)
    changed *= factors.astype(np.float32)[:, None]
    changed -= values
    changed *= np.float32(strength)
    return changed


class _Piece(NamedTuple):
    """A pair that adapts rows from `first` on of a matrix in the file."""

    first: int
    pair: Pair


class Patch(Protocol):
    """What adapters do to one tensor of a file, block by block.

    Of one that is `turned`, a matrix has to be taken whole.
    """

    @property
    def turned(self) -> bool:
        """Whether rows of the tree are columns in the file."""

    def rows(self, read: Read, matrix: int, start: int, stop: int) -> Floats:
        """Rows start to stop of a matrix of the adapted tensor; `read` gives the base's."""


class MatrixPatch:
    """What the pairs of adapters do to one tensor."""

    def __init__(self, base: Base, tensor: str, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self._layer, self._kind = split_name(tensor.removesuffix(".weight"))
        self._base = base
        self._adapters = adapters
        self.turned = self._kind == "attn_k_b"

    def rows(self, read: Read, matrix: int, start: int, stop: int) -> Floats:
        """Rows start to stop of a matrix of the adapted tensor; `read` gives the base's."""
        if self.turned:
            # Lengths of rows, of DoRA, are those of what here are columns.
            height = self._base.shapes[f"blk.{self._layer}.attn_k_b.weight"][-2]
            whole = np.ascontiguousarray(read(matrix, 0, height).T)
            return np.ascontiguousarray(self._changed(whole, matrix, 0).T[start:stop])
        return self._changed(read(matrix, start, stop), matrix, start)

    def _changed(self, values: Floats, matrix: int, start: int) -> Floats:
        out = values.copy()
        for adapter, strength in self._adapters:
            for first, pair in self._pieces(adapter.tree, matrix):
                low = max(start, first)
                high = min(start + len(values), first + len(pair["b"]))
                if low >= high:
                    continue
                rows = slice(low - start, high - start)
                own = slice(low - first, high - first)
                part = {name: pair[name][own] for name in pair if name != "a"}
                part["a"] = pair["a"]
                out[rows] += _change(values[rows], part, adapter.scale, strength)
        return out

    def _pieces(self, tree: Tree, matrix: int) -> list[_Piece]:
        """The pairs for the rows of one matrix: of one head, or one expert, where it is stacked."""
        prefix = f"blk.{self._layer}."
        if self._kind in ("attn_k_b", "attn_v_b"):
            return self._latent(tree.get(prefix + "attn_kv_b"), matrix)
        if self._kind == FUSED:
            halves = [tree.get(prefix + kind) for kind in (GATE, UP)]
            rows = self._base.matrices[prefix + GATE].rows
            return [
                _Piece(place * rows, _expert(half, matrix))
                for place, half in enumerate(halves)
                if half is not None
            ]
        pair = tree.get(prefix + self._kind)
        if pair is None:
            return []
        return [_Piece(0, _expert(pair, matrix) if pair["a"].ndim == 3 else pair)]

    def _latent(self, pair: Pair | None, head: int) -> list[_Piece]:
        latent = self._base.latent_heads(self._layer)
        if pair is None or latent is None:
            return []
        _, keys, values = latent
        first = head * (keys + values) + (0 if self.turned else keys)
        rows = slice(first, first + (keys if self.turned else values))
        return [_Piece(0, {n: array if n == "a" else array[rows] for n, array in pair.items()})]


def patches(base: Base, adapters: Sequence[tuple[Adapter, float]]) -> Mapping[str, Patch]:
    """What the adapters, each with its strength, do to the tensors of a file, by their names.

    Raises `AdapterError` for a pair that does not fit.
    """
    found: dict[str, Patch] = {}
    for adapter, strength in adapters:
        if not np.isfinite(strength):
            raise AdapterError(f"{adapter.name}: the scale {strength} is no number")
        base.check(adapter.tree, adapter.name)
        for name in adapter.tree:
            for tensor in _tensors(base, name):
                found.setdefault(tensor, MatrixPatch(base, tensor, adapters))
        check_biases(base, adapter.biases, adapter.name)
        for name in adapter.biases:
            found.setdefault(name, BiasPatch(name, adapters))
    return found


def _tensors(base: Base, name: str) -> list[str]:
    """The tensors of the file that a tree's name stands for."""
    layer, kind = split_name(name)
    prefix = f"blk.{layer}."
    if kind == "attn_kv_b" and base.latent_heads(layer):
        return [prefix + "attn_k_b.weight", prefix + "attn_v_b.weight"]
    if kind in (GATE, UP) and base.is_fused(layer):
        return [prefix + FUSED + ".weight"]
    return [f"{name}.weight"]


def _expert(pair: Pair, index: int) -> Pair:
    return {part: array[index] for part, array in pair.items()}

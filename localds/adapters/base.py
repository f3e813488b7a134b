"""The model that an adapter belongs to: which of its matrices can be adapted, and their shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from localds.adapters.adapter import AdapterError
from localds.adapters.names import ATTENTION, DOWN, FUSED, GATE, ROUTER_NAME, UP, split_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localds.adapters.adapter import Pair, Tree
    from localds.gguf import GGUFFile

_PLAIN = (
    *(f"ffn_{kind}{place}" for kind in ("gate", "up", "down") for place in ("", "_shexp")),
    ROUTER_NAME,
)
_STACKED = (GATE, UP, DOWN)


class Matrix(NamedTuple):
    """A matrix [rows, columns] that can be adapted, or a stack of them, one for each expert."""

    rows: int
    columns: int
    experts: int | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """Facts about a model. `shapes` are those of all its tensors in numpy order, slowest first.

    `layers` are those that compute the next token; `heads` and `kv_heads` the heads of queries and
    of keys. `matrices` are what can be adapted, by the names that trees have for them.
    """

    name: str
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]]
    matrices: Mapping[str, Matrix] = field(init=False)

    def __post_init__(self) -> None:
        if self.architecture not in ATTENTION:
            raise AdapterError(
                f"{self.name}: adapters are known for {', '.join(ATTENTION)}, not for the "
                f"architecture {self.architecture!r}"
            )
        found: dict[str, Matrix] = {}
        for layer in range(self.layers):
            for kind in (*ATTENTION[self.architecture], *_PLAIN, *_STACKED):
                matrix = self._matrix(layer, kind)
                if matrix is not None:
                    found[f"blk.{layer}.{kind}"] = matrix
        object.__setattr__(self, "matrices", found)

    @classmethod
    def of(cls, gguf: GGUFFile) -> Base:
        """The model in a file. Raises `GGUFError` for missing keys, `AdapterError` for others."""
        key = gguf.architecture + "."
        heads = gguf.integer(key + "attention.head_count", 1)
        return cls(
            name=str(gguf.path),
            architecture=gguf.architecture,
            layers=gguf.integer(key + "block_count", 0)
            - gguf.integer(key + "nextn_predict_layers", 0),
            heads=heads,
            kv_heads=gguf.integer(key + "attention.head_count_kv", heads),
            shapes={name: tensor.shape[::-1] for name, tensor in gguf.tensors.items()},
        )

    def latent_heads(self, layer: int) -> tuple[int, int, int] | None:
        """Heads, key and value rows of each, where a layer has attn_kv_b in two; else None."""
        keys = self.shapes.get(f"blk.{layer}.attn_k_b.weight")
        values = self.shapes.get(f"blk.{layer}.attn_v_b.weight")
        if keys is None or values is None:
            return None
        keys, values = _stack(keys), _stack(values)
        return keys[0], keys[2], values[1]

    def is_fused(self, layer: int) -> bool:
        """Whether a layer's experts have gate and up in one tensor."""
        return f"blk.{layer}.{FUSED}.weight" in self.shapes

    def check(self, tree: Tree, where: str) -> None:
        """Raise `AdapterError` unless every pair fits this model and is finite."""
        if not tree:
            raise AdapterError(f"{where}: there is no adapted matrix in it")
        for name, pair in tree.items():
            self._check_pair(pair, self.matrix(name, where), f"{where}: {name}")

    def matrix(self, name: str, where: str) -> Matrix:
        """The matrix of a tree's name; raises `AdapterError` where the model has none."""
        if name in self.matrices:
            return self.matrices[name]
        layer = split_name(name)[0]
        if layer >= self.layers:
            raise AdapterError(
                f"{where}: it adapts layer {layer}, and {self.name} has {self.layers} (from 0 "
                "on); it belongs to another model"
            )
        raise AdapterError(
            f"{where}: it adapts {name}, which {self.name} ({self.architecture}) has not; it "
            "belongs to another model"
        )

    def _check_pair(self, pair: Pair, matrix: Matrix, where: str) -> None:
        missing = {"a", "b"} - set(pair)
        if missing or set(pair) - {"a", "b", "m"}:
            raise AdapterError(f"{where}: parts {sorted(pair)} are there; a pair is a and b")
        rank = pair["a"].shape[-2] if pair["a"].ndim > 1 else 0
        lead = () if matrix.experts is None else (matrix.experts,)
        expected = {"a": (rank, matrix.columns), "b": (matrix.rows, rank), "m": (matrix.rows,)}
        for part, array in pair.items():
            if array.shape != lead + expected[part] or not rank:
                raise AdapterError(
                    f"{where}: part {part} has shape {array.shape}, and {self.name} needs "
                    f"{lead + expected[part]}; it belongs to another model"
                )
            if not np.isfinite(array).all():
                raise AdapterError(f"{where}: part {part} has values that are no numbers")

    def _matrix(self, layer: int, kind: str) -> Matrix | None:
        shape = self.shapes.get(f"blk.{layer}.{kind}.weight")
        latent = self.latent_heads(layer)
        if kind == "attn_kv_b" and latent:
            heads, keys, values = latent
            rank = _stack(self.shapes[f"blk.{layer}.attn_k_b.weight"])[1]
            return Matrix(heads * (keys + values), rank)
        if kind in (GATE, UP) and self.is_fused(layer):
            experts, rows, columns = _stack(self.shapes[f"blk.{layer}.{FUSED}.weight"])
            return Matrix(rows // 2, columns, experts)
        if shape is None:
            return None
        if kind in _STACKED:
            experts, rows, columns = _stack(shape)
            return Matrix(rows, columns, experts)
        return Matrix(shape[-2], shape[-1]) if len(shape) > 1 else Matrix(1, shape[0])


def _stack(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape in three dimensions: writers may drop a first dimension of 1."""
    experts, rows, columns = (1, 1, 1, *shape)[-3:]
    return experts, rows, columns

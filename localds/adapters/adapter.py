"""A low-rank adapter in memory: pairs of matrices by the tensors that they change."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localds.finetune.config import AdapterConfig

Floats = NDArray[np.float32]
Pair = dict[str, Floats]
"""What changes one matrix W [out, in]: "a" [rank, in] and "b" [out, rank], of DoRA also "m" [out],
the lengths of its rows. Of stacked experts all three have the expert as their first dimension."""
Tree = dict[str, Pair]
"""Pairs by the name of the GGUF tensor without ".weight", such as "blk.3.attn_q".

"blk.N.attn_kv_b" is always in this joint form: rows of each head, keys before values, as in
checkpoints, also where a file has attn_k_b and attn_v_b. Experts are under ffn_gate_exps,
ffn_up_exps and ffn_down_exps, also where a file has a fused gate_up. Rows are in the file's order.
"""


class AdapterError(ValueError):
    """An adapter cannot be read, written, or used with a model."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter: W becomes W + scale * B A for each pair of the tree, arrays in float32.

    `base_model` and `revision` name the model that it was trained on, where that is known.
    `biases` are those that training moved on the router's choice of experts, as they were then,
    float32 [experts] by the names of their tensors, such as "blk.3.exp_probs_b.bias".
    """

    name: str
    config: AdapterConfig
    tree: Tree
    base_model: str | None = None
    revision: str | None = None
    biases: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """What every B A is multiplied by."""
        return self.config.scale

    def digest(self) -> str:
        """A SHA-256 in hex of all that it does to a model."""
        digest = hashlib.sha256(f"{self.config.method} {self.scale!r}".encode())
        for name in sorted(self.tree):
            for part, array in sorted(self.tree[name].items()):
                digest.update(f"{name} {part} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        for name, bias in sorted(self.biases.items()):
            digest.update(f"{name} {bias.shape}".encode())
            digest.update(np.ascontiguousarray(bias).data)
        return digest.hexdigest()

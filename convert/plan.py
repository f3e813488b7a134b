"""What a conversion is going to write: a table of the model's parts, their types and bytes."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from convert.source import Target
    from localds.gguf import GGMLType

PARTS = (
    ("embeddings", r"^token_embd\.weight"),
    ("output", r"^output\.weight"),
    ("routers and norms", r"_norm\.|ffn_gate_inp|\.bias|norm\.weight"),
    ("multi-token prediction", r"\.nextn\."),
    ("attention", r"\.attn_"),
    ("shared experts", r"_shexp\."),
    ("routed experts", r"_exps\."),
    ("dense feed-forward", r"\.ffn_"),
    ("other", r""),
)


@dataclass(slots=True)
class Part:
    """The tensors of one part of the model: how many, their elements, and bytes by type."""

    name: str
    tensors: int = 0
    elements: int = 0
    nbytes: Counter[str] = field(default_factory=Counter)

    def add(self, target: Target, kind: GGMLType) -> None:
        """Count one tensor."""
        self.tensors += 1
        self.elements += target.elements
        size = math.prod(target.shape) // kind.block_elements * kind.block_bytes
        self.nbytes[kind.name] += size

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes.total() / max(self.elements, 1)


def parts(targets: Iterable[Target], types: Sequence[GGMLType]) -> list[Part]:
    """The parts of a model that are there, in the order of `PARTS`, and their total."""
    found = {name: Part(name) for name, _ in PARTS}
    total = Part("total")
    for target, kind in zip(targets, types, strict=True):
        name = next(name for name, pattern in PARTS if re.search(pattern, target.name))
        found[name].add(target, kind)
        total.add(target, kind)
    return [part for part in found.values() if part.tensors] + [total]


def plan_table(targets: Iterable[Target], types: Sequence[GGMLType]) -> str:
    """The parts as lines of text."""
    lines = [f"{'part':<24}{'tensors':>8}{'weights':>10}{'size':>11}{'bits':>6}  types"]
    for part in parts(targets, types):
        kinds = ", ".join(kind for kind, _ in part.nbytes.most_common())
        lines.append(
            f"{part.name:<24}{part.tensors:>8}{_count(part.elements):>10}"
            f"{format_size(part.nbytes.total()):>11}{part.bits:>6.2f}  {kinds}"
        )
    return "\n".join(lines)


def _count(elements: int) -> str:
    """A number of weights in three digits: "15.7B"."""
    value = float(elements)
    for unit in ("", "K", "M", "B"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"

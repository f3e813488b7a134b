"""Random adapters of the tiny checkpoints, and what they do to them by plain numpy.

Adapters are described as checkpoints name things: (A, B, magnitudes or None) by module, such as
"model.layers.1.mlp.experts.3.up_proj". Folders of PEFT are written from that by safetensors' own
library, so that nothing here shares code with what is tested.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from checkpoints import (
    VARIANTS,
    golden_config,
    golden_shapes,
    make_weights,
    uniform,
    write_checkpoint,
)
from safetensors.numpy import save_file

from convert import convert_checkpoint
from localds.adapters import Base
from localds.gguf import GGUFFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Parts = tuple[Floats, Floats, Floats | None]
    Weights = dict[str, Floats]

ATTENTION = r"self_attn\.\w+_proj(_with_mqa)?|self_attn\.[qkvo]_proj"
DENSE = r"mlp\.(shared_experts\.)?(gate|up|down)_proj"
EXPERTS = r"(mlp|block_sparse_moe)\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)"
ROUTER = r"(mlp|block_sparse_moe)\.gate"
EVERYTHING = "|".join((ATTENTION, DENSE, EXPERTS, ROUTER))


@dataclass
class Case:
    """An adapter of a variant: modules that match `modules`, by PEFT's method and scale."""

    variant: str
    modules: str = EVERYTHING
    rank: int = 3
    alpha: float = 6.0
    rslora: bool = False
    dora: bool = False
    seed: int = 7
    parts: dict[str, Parts] = field(init=False)

    def __post_init__(self) -> None:
        pattern = re.compile(rf"model\.layers\.\d+\.({self.modules})\.weight")
        self.parts = {
            name.removesuffix(".weight"): self._random(name.removesuffix(".weight"), shape)
            for name, shape in golden_shapes(self.variant).items()
            if pattern.fullmatch(name)
        }

    def _random(self, name: str, shape: tuple[int, ...]) -> Parts:
        out, columns = shape
        a = uniform(self.seed, name + "A", (self.rank, columns)) / np.float32(np.sqrt(columns))
        b = uniform(self.seed, name + "B", (out, self.rank)) / np.float32(self.scale)
        lengths = np.float32(1) + uniform(self.seed, name + "m", (out,)) / 2
        return a, b, lengths if self.dora else None

    @property
    def scale(self) -> float:
        return self.alpha / (np.sqrt(self.rank) if self.rslora else self.rank)

    def weights(self, strength: float = 1.0, *, adapted: bool = True) -> Weights:
        """All tensors of the checkpoint, the adapted ones changed."""
        weights = make_weights(golden_shapes(self.variant), VARIANTS[self.variant].seed)
        for module, (a, b, m) in self.parts.items() if adapted else ():
            w = weights[module + ".weight"].astype(np.float64)
            new = w + self.scale * (b.astype(np.float64) @ a.astype(np.float64))
            if m is not None:
                new *= (m / np.sqrt((new**2).sum(1)))[:, None]
            weights[module + ".weight"] = (w + strength * (new - w)).astype(np.float32)
        return weights

    def gguf(self, path: Path, strength: float = 1.0, *, adapted: bool = False) -> Path:
        """The model as an F32 file, with the adapter merged into the checkpoint or without."""
        variant = VARIANTS[self.variant]
        folder = path.with_suffix(".checkpoint")
        config = golden_config(self.variant)
        write_checkpoint(folder, config, self.weights(strength, adapted=adapted))
        convert_checkpoint(folder, path, pre=variant.pre)
        return path

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "target_modules": sorted({module.rpartition(".")[2] for module in self.parts}),
            "base_model_name_or_path": "someone/tiny",
            "revision": "abc",
        } | changes

    def tensors(self) -> Weights:
        """As PEFT names them where each expert is a module."""
        found: Weights = {}
        for module, (a, b, m) in self.parts.items():
            prefix = f"base_model.model.{module}.lora_"
            found |= {prefix + "A.weight": a, prefix + "B.weight": b}
            if m is not None:
                found[prefix + "magnitude_vector"] = m
        return found

    def folder(
        self, folder: Path, tensors: Mapping[str, Any] | None = None, **changes: Any
    ) -> Path:
        """Write a folder of PEFT, with other tensors and changes to its configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = self.tensors() if tensors is None else dict(tensors)
        save_file(
            {name: np.ascontiguousarray(array) for name, array in kept.items()},
            folder / "adapter_model.safetensors",
            {"format": "pt"},
        )
        (folder / "adapter_config.json").write_text(json.dumps(self.config(**changes)))
        return folder


def base_of(tmp_path: Path, case: Case) -> Base:
    """What adapters of a case's model must fit."""
    return Base.of(GGUFFile.open(case.gguf(tmp_path / f"{case.variant}.gguf")))

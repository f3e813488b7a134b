"""Reading adapter folders of PEFT: adapter_config.json and adapter_model.safetensors.

Both forms of routed experts are read: transformers 5 has them stacked (modules `mlp.experts` for
the outer of two adapted parameters, `mlp.experts.base_layer` for the inner one), older checkpoints
have a module for each expert. Pickled files are refused: they can run code. Biases that `localds
finetune` wrote beside them belong to the adapter, see `biases`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from localds.adapters.adapter import Adapter, AdapterError
from localds.adapters.biases import read_biases
from localds.adapters.layout import interleave, unflatten, unfuse
from localds.adapters.names import DOWN, EXPERT_NAMES, GATE, INTERLEAVED, UP, kind_of, targets_of
from localds.adapters.peft_config import read_config
from localds.adapters.safetensors import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from localds.adapters.adapter import Pair, Tree
    from localds.adapters.base import Base
    from localds.adapters.peft_config import PeftConfig
    from localds.adapters.safetensors import Stored

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_KEY = re.compile(
    r"base_model\.model\.(?:language_model\.)?(model\.layers\.(\d{1,4})\.([\w.]+))\."
    r"lora_(A\.weight|B\.weight|magnitude_vector(?:\.weight)?)"
)
_PARTS = {"A.weight": "a", "B.weight": "b"}
_EXPERTS = re.compile(r"(?:mlp|block_sparse_moe)\.experts((?:\.base_layer)*)")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d{1,4})\.(\w+)")

Parts = dict[str, "Stored"]


def read_peft(folder: Path, base: Base) -> Adapter:
    """Read an adapter of `base`. Raises `AdapterError` for what is damaged or does not fit."""
    config = read_config(folder)
    reader = _Reader(folder, base, config)
    for (layer, module), (path, parts) in reader.modules(_find_weights(folder)).items():
        reader.add(layer, module, path, parts)
    tree = reader.finish()
    base.check(tree, str(folder))
    return Adapter(
        name=folder.resolve().name,
        config=config.adapter_config(targets_of(base.architecture, tree)),
        tree=tree,
        base_model=config.base_model,
        revision=config.revision,
        biases=read_biases(folder, base),
    )


def _find_weights(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    pickled = [name for name in _PICKLES if (folder / name).exists()]
    if pickled:
        raise AdapterError(
            f"{folder / pickled[0]}: it is pickled, and opening it can run code; save it in PEFT "
            f"with safe_serialization=True, which makes {WEIGHTS_FILE}"
        )
    raise AdapterError(f"{folder}: there is no {WEIGHTS_FILE}")


class _Reader:
    """Collects a tree from modules. Data are read when shapes are known to fit."""

    def __init__(self, folder: Path, base: Base, config: PeftConfig) -> None:
        self._where = str(folder)
        self._base = base
        self._config = config
        self._scale = config.adapter_config(("q_proj",)).scale
        self._tree: Tree = {}
        self._single: dict[str, dict[int, Pair]] = defaultdict(dict)

    def modules(self, path: Path) -> dict[tuple[int, str], tuple[str, Parts]]:
        """The parts of each module of a file, by layer and name, with the module's full name."""
        found: dict[tuple[int, str], tuple[str, Parts]] = {}
        for key, stored in read_header(path).items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise AdapterError(
                    f"{path}: tensor {key[:120]!r} is none of an adapted projection; localds reads "
                    "pairs lora_A and lora_B of the layers' projections"
                )
            module = (int(match[2]), match[3])
            parts = found.setdefault(module, (match[1], {}))[1]
            part = _PARTS.get(match[4], "m")
            if part in parts:
                raise AdapterError(f"{path}: tensor {key[:120]!r} is there twice")
            parts[part] = stored
        for name, parts in found.values():
            needed = {"a", "b", "m"} if self._config.dora else {"a", "b"}
            if set(parts) != needed:
                raise AdapterError(
                    f"{path}: {name} has parts {sorted(parts)} and needs {sorted(needed)} (a is "
                    "lora_A, b lora_B, m the magnitudes of DoRA); the file is incomplete"
                )
        return found

    def add(self, layer: int, module: str, path: str, parts: Parts) -> None:
        """Take the pair of one module."""
        kind = kind_of(self._base.architecture, module.replace("block_sparse_moe", "mlp"))
        if kind is not None:
            self._add_plain(f"blk.{layer}.{kind}", path, parts)
        elif match := _EXPERT.fullmatch(module):
            self._add_expert(layer, int(match[1]), match[2], path, parts)
        elif _EXPERTS.fullmatch(module):
            self._add_stack(layer, path, parts)
        else:
            raise AdapterError(
                f"{self._where}: it adapts {path}, which localds cannot; retrain it on projections "
                "of attention, feed-forward, experts or the router"
            )

    def finish(self) -> Tree:
        """The whole tree; experts that were read one by one are stacked."""
        for name, pairs in self._single.items():
            count = self._base.matrix(name, self._where).experts or 1
            missing = [index for index in range(count) if index not in pairs]
            if missing:
                raise AdapterError(
                    f"{self._where}: {name} has no pair for expert {missing[0]}; all experts of a "
                    "layer must be adapted, or none"
                )
            parts = pairs[0]
            if any(pair["a"].shape != parts["a"].shape for pair in pairs.values()):
                raise AdapterError(f"{self._where}: the experts of {name} have different ranks")
            self._put(name, {p: np.stack([pairs[i][p] for i in range(count)]) for p in parts})
        return self._tree

    def _add_plain(self, name: str, path: str, parts: Parts) -> None:
        matrix = self._base.matrix(name, self._where)
        names = (path, path + ".weight")
        pair = self._read(names, parts, matrix.rows, matrix.columns)
        kind = name.rpartition(".")[2]
        if kind in INTERLEAVED[self._base.architecture]:
            heads = self._base.heads if kind == "attn_q" else self._base.kv_heads
            pair |= {part: interleave(pair[part], heads) for part in ("b", "m") if part in pair}
        self._put(name, pair)

    def _add_expert(self, layer: int, index: int, leaf: str, path: str, parts: Parts) -> None:
        names = EXPERT_NAMES[self._base.architecture]
        kind = next((kind for kind, name in names.items() if name == leaf), None)
        if kind is None:
            raise AdapterError(f"{self._where}: it adapts {path}, which experts have not")
        name = f"blk.{layer}.{kind}"
        matrix = self._base.matrix(name, self._where)
        if index >= (matrix.experts or 1):
            raise AdapterError(
                f"{self._where}: it adapts {path}, and {self._base.name} has {matrix.experts} "
                "experts; it belongs to another model"
            )
        if index in self._single[name]:
            raise AdapterError(f"{self._where}: {path} is adapted twice")
        self._single[name][index] = self._read((path,), parts, matrix.rows, matrix.columns)

    def _add_stack(self, layer: int, path: str, parts: Parts) -> None:
        """A parameter that stacks all experts; which of the two it is, its shape tells."""
        down = self._base.matrix(f"blk.{layer}.{DOWN}", self._where)
        gate = self._base.matrix(f"blk.{layer}.{GATE}", self._where)
        experts = down.experts or 1
        module = path.replace(".base_layer", "")
        # Gate and up together may have as many rows as down.
        of_down = parts["b"].shape[:1] == (down.rows,) and parts["a"].shape[1:] == (down.columns,)
        if parts["b"].shape[:1] == (2 * gate.rows,) and not of_down:
            names = (module + ".gate_up_proj",)
            pair = self._read(names, parts, 2 * gate.rows, gate.columns, experts)
            for kind, half in zip((GATE, UP), unfuse(pair), strict=True):
                if half is not None:
                    self._put(f"blk.{layer}.{kind}", half)
        else:
            names = (module + ".down_proj",)
            pair = self._read(names, parts, down.rows, down.columns, experts)
            self._put(f"blk.{layer}.{DOWN}", pair)

    def _read(
        self,
        names: tuple[str, ...],
        parts: Parts,
        rows: int,
        columns: int,
        experts: int | None = None,
    ) -> Pair:
        """Check a module's shapes and read its pair, brought to the scale of the whole adapter."""
        rank = self._config.rank_of(*names)
        ranks = rank * (experts or 1)
        expected = {"a": (ranks, columns), "b": (rows, ranks), "m": (rows,)}
        for part, stored in parts.items():
            if stored.shape != expected[part]:
                raise AdapterError(
                    f"{self._where}: {stored.name} has shape {stored.shape}; rank {rank} on "
                    f"{self._base.name} needs {expected[part]}: it belongs to another model, or "
                    "its configuration to another adapter"
                )
        pair = {part: stored.read() for part, stored in parts.items()}
        pair["b"] *= np.float32(self._config.scale_of(*names) / self._scale)
        return pair if experts is None else unflatten(pair["a"], pair["b"], experts)

    def _put(self, name: str, pair: Pair) -> None:
        if name in self._tree:
            raise AdapterError(f"{self._where}: {name} is adapted twice")
        self._tree[name] = pair

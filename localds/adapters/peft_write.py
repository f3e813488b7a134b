"""Writing adapter folders that PEFT loads on the models of transformers 5.

What is no torch.nn.Linear there (stacked experts, the router) is named in `target_parameters`. So
are projections of feed-forward layers: PEFT takes gate_proj, up_proj and down_proj in
`target_modules` of DeepSeek models for those of old checkpoints' experts.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from localds.adapters.adapter import AdapterError
from localds.adapters.biases import BIASES_FILE, check_biases
from localds.adapters.layout import deinterleave, flatten, fuse
from localds.adapters.names import (
    ATTENTION,
    DOWN,
    EXPERT_NAMES,
    GATE,
    INTERLEAVED,
    UP,
    module_of,
    split_name,
)
from localds.adapters.peft_config import CONFIG_FILE
from localds.adapters.peft_read import WEIGHTS_FILE
from localds.adapters.safetensors import write_safetensors
from localds.gguf.write import replaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from localds.adapters.adapter import Adapter, Floats, Pair
    from localds.adapters.base import Base

_EXPERT_MODULES = {
    "deepseek2": "mlp.experts.{}.{}",
    "llama": "block_sparse_moe.experts.{}.{}",
}


def write_peft(folder: Path, adapter: Adapter, base: Base) -> list[str]:
    """Write an adapter of `base` as a folder of PEFT, which is made if need be.

    Biases go into a file beside it; one of an earlier adapter is removed.

    Returns lines that a person should see: what PEFT itself will not load. Raises `AdapterError`
    for an adapter that does not fit, `OSError` where the folder cannot be written.
    """
    base.check(adapter.tree, adapter.name)
    check_biases(base, adapter.biases, adapter.name)
    collected = _Collected(adapter, base)
    for layer in range(base.layers):
        collected.add_layer(layer)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_FILE, collected.tensors)
    if adapter.biases:
        write_safetensors(folder / BIASES_FILE, adapter.biases)
    else:
        (folder / BIASES_FILE).unlink(missing_ok=True)
    text = json.dumps(collected.config(), indent=2, sort_keys=True)
    with replaced(folder / CONFIG_FILE) as stream:
        stream.write(text.encode() + b"\n")
    return collected.notes()


class _Collected:
    """The tensors of the file, and the targets and ranks of its configuration.

    `modules` and `parameters` are full names of what is adapted, with its rank.
    """

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.tensors: dict[str, Floats] = {}
        self._modules: dict[str, int] = {}
        self._parameters: dict[str, int] = {}
        self._adapter = adapter
        self._base = base
        self._dora = adapter.config.method == "dora"
        for name, pair in adapter.tree.items():
            if ("m" in pair) != self._dora:
                raise AdapterError(
                    f"{adapter.name}: {name} has {'no ' if self._dora else ''}magnitudes, and its "
                    f"method is {adapter.config.method}"
                )

    def add_layer(self, layer: int) -> None:
        """Take the pairs of one layer."""
        pairs = {
            kind: pair
            for name, pair in self._adapter.tree.items()
            for number, kind in [split_name(name)]
            if number == layer
        }
        for kind in [*pairs]:
            if kind not in (GATE, UP, DOWN):
                self._add_plain(f"model.layers.{layer}.", kind, pairs.pop(kind))
        if self._dora:
            for kind, pair in pairs.items():
                self._add_single(f"model.layers.{layer}.", kind, pair)
        elif pairs:
            self._add_stacks(layer, pairs)

    def config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        config = self._adapter.config
        ranks = _patterns({**self._modules, **self._parameters}, config.rank)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._adapter.base_model,
            "revision": self._adapter.revision,
            "r": config.rank,
            "lora_alpha": _plain(config.alpha),
            "use_rslora": config.method == "rslora",
            "use_dora": self._dora,
            # PEFT refuses dropout on parameters; for inference it means nothing.
            "lora_dropout": 0.0 if self._parameters else config.dropout,
            "target_modules": self._targets(self._modules),
            "target_parameters": self._targets(self._parameters) or None,
            "rank_pattern": ranks,
            "alpha_pattern": {key: _plain(self._alpha(rank)) for key, rank in ranks.items()},
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
        }

    def notes(self) -> list[str]:
        """What PEFT will not load."""
        kinds = {split_name(name)[1] for name in self._adapter.tree}
        beyond = sorted(kind for kind in kinds if kind not in ATTENTION[self._base.architecture])
        if not self._dora or not beyond:
            return []
        return [
            f"PEFT has no DoRA for {', '.join(beyond)} on transformers 5: localds reads the "
            "folder, PEFT does not; merge it (localds convert MODEL --merge) to use it elsewhere"
        ]

    def _alpha(self, rank: int) -> float:
        """What gives a pair of this rank the scale of the adapter."""
        rslora = self._adapter.config.method == "rslora"
        return self._adapter.scale * (math.sqrt(rank) if rslora else rank)

    def _add_plain(self, prefix: str, kind: str, pair: Pair) -> None:
        architecture = self._base.architecture
        if kind in INTERLEAVED[architecture]:
            heads = self._base.heads if kind == "attn_q" else self._base.kv_heads
            rows = {part: deinterleave(pair[part], heads) for part in ("b", "m") if part in pair}
            pair = pair | rows
        module = prefix + module_of(architecture, kind)
        self._put(module, pair)
        if self._dora or kind in ATTENTION[architecture]:
            self._modules[module] = pair["a"].shape[0]
        else:
            self._parameters[module + ".weight"] = pair["a"].shape[0]

    def _add_single(self, prefix: str, kind: str, pair: Pair) -> None:
        """Each expert as a module of its own, as in checkpoints."""
        architecture = self._base.architecture
        leaf = EXPERT_NAMES[architecture][kind]
        for index in range(len(pair["a"])):
            module = prefix + _EXPERT_MODULES[architecture].format(index, leaf)
            self._put(module, {part: array[index] for part, array in pair.items()})
            self._modules[module] = pair["a"].shape[1]

    def _add_stacks(self, layer: int, pairs: Mapping[str, Pair]) -> None:
        """Stacked experts: of two adapted parameters, transformers' second is the outer one."""
        module = f"model.layers.{layer}.mlp.experts"
        inner = module
        if DOWN in pairs:
            self._put(module, _flat(pairs[DOWN]))
            self._parameters[module + ".down_proj"] = pairs[DOWN]["a"].shape[1]
            inner += ".base_layer"
        if GATE in pairs or UP in pairs:
            rows = self._base.matrices[f"blk.{layer}.{GATE}"].rows
            fused = fuse(pairs.get(GATE), pairs.get(UP), rows)
            self._put(inner, _flat(fused))
            self._parameters[module + ".gate_up_proj"] = fused["a"].shape[1]

    def _put(self, module: str, pair: Pair) -> None:
        prefix = f"base_model.model.{module}.lora_"
        self.tensors[prefix + "A.weight"] = pair["a"]
        self.tensors[prefix + "B.weight"] = pair["b"]
        if "m" in pair:
            self.tensors[prefix + "magnitude_vector"] = pair["m"]

    def _targets(self, names: Iterable[str]) -> list[str]:
        """Targets that match these names alone: ends of names where all layers have them."""
        chosen: list[str] = []
        for end, group in _by_end(names).items():
            layers = {name.split(".")[2] for name in group}
            everywhere = layers == self._layers_with(end)
            chosen += [end] if everywhere else group
        return sorted(chosen)

    def _layers_with(self, end: str) -> set[str]:
        """The layers, as texts, that have a module or parameter of this name."""
        architecture = self._base.architecture
        module = end.removesuffix(".weight")
        if module.startswith(("mlp.experts", "block_sparse_moe.experts")):
            kinds = [DOWN]
        else:
            names = {split_name(name)[1] for name in self._base.matrices}
            kinds = [kind for kind in names if module_of(architecture, kind) == module]
        return {str(layer) for layer, kind in map(split_name, self._base.matrices) if kind in kinds}


def _flat(pair: Pair) -> Pair:
    a, b = flatten(pair)
    return {"a": a, "b": b}


def _by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what follows the number of their layer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".", 3)[3], []).append(name)
    return groups


def _patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """The ranks that are not the usual one, by ends of names where they hold for all of these."""
    patterns: dict[str, int] = {}
    for end, group in _by_end(ranks).items():
        found = {ranks[name] for name in group}
        if found == {usual}:
            continue
        if len(found) == 1:
            patterns[end] = found.pop()
        else:
            patterns |= {name: ranks[name] for name in group}
    return patterns


def _plain(value: float) -> float:
    """A number as people write it: whole ones without a point."""
    return int(value) if value == np.floor(value) else value

"""Presets: which type each tensor gets, chosen as llama-quantize does.

Facts: llama.cpp's src/llama-quant.cpp. A preset has a base type; projections into the residual
stream and the output get more bits, some of them only in the first and last layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.gguf import GGMLType

if TYPE_CHECKING:
    from collections.abc import Callable

    from convert.source import Source, Target


@dataclass(frozen=True, slots=True)
class Preset:
    """The type of most tensors, and the value of `general.file_type`."""

    base: GGMLType
    file_type: int


PRESETS = {
    "F32": Preset(GGMLType.F32, 0),
    "F16": Preset(GGMLType.F16, 1),
    "BF16": Preset(GGMLType.BF16, 32),
    "Q8_0": Preset(GGMLType.Q8_0, 7),
    "Q4_0": Preset(GGMLType.Q4_0, 2),
    "Q4_1": Preset(GGMLType.Q4_1, 3),
    "Q5_0": Preset(GGMLType.Q5_0, 8),
    "Q5_1": Preset(GGMLType.Q5_1, 9),
    "Q2_K": Preset(GGMLType.Q2_K, 10),
    "Q3_K_S": Preset(GGMLType.Q3_K, 11),
    "Q3_K_M": Preset(GGMLType.Q3_K, 12),
    "Q3_K_L": Preset(GGMLType.Q3_K, 13),
    "Q4_K_S": Preset(GGMLType.Q4_K, 14),
    "Q4_K_M": Preset(GGMLType.Q4_K, 15),
    "Q5_K_S": Preset(GGMLType.Q5_K, 16),
    "Q5_K_M": Preset(GGMLType.Q5_K, 17),
    "Q6_K": Preset(GGMLType.Q6_K, 18),
    "IQ4_NL": Preset(GGMLType.IQ4_NL, 25),
    "IQ4_XS": Preset(GGMLType.IQ4_XS, 30),
    "MXFP4_MOE": Preset(GGMLType.MXFP4, 38),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)

# Where a row is not a multiple of a type's 256 elements.
FALLBACKS = {
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
    GGMLType.IQ4_XS: GGMLType.IQ4_NL,
}


def find_preset(name: str) -> str:
    """The name of a preset as people write it. Raises `ValueError` if there is none."""
    upper = name.upper()
    preset = ALIASES.get(upper, upper)
    if preset not in PRESETS:
        raise ValueError(
            f"--type: {name!r} is not known; choose one of {', '.join(PRESETS)}, or a size to "
            "meet, such as fit:12GiB"
        )
    return preset


def preset_types(source: Source, preset: str, *, has_importance: bool) -> list[GGMLType]:
    """The types that llama-quantize gives the tensors of a model, in order."""
    rules = _Rules(source, preset, has_importance)
    return [
        rules.choose(target) if is_quantized(target) else unquantized_type(source, target)
        for target in source.targets
    ]


def is_quantized(target: Target) -> bool:
    """Whether recipes choose the type: for matrices, but routers and norms."""
    return (
        len(target.shape) > 1
        and target.name.endswith("weight")
        and not re.search(r"_norm\.weight|ffn_gate_inp\.weight", target.name)
    )


def unquantized_type(source: Source, target: Target) -> GGMLType:
    """The type of a tensor that recipes leave alone: that of a GGUF source, else float32."""
    return GGMLType[target.stored] if source.path.suffix == ".gguf" else GGMLType.F32


def fitting_type(kind: GGMLType, columns: int) -> GGMLType:
    """`kind`, or what replaces it where rows are no multiple of its blocks."""
    if columns % kind.block_elements == 0:
        return kind
    fallback = FALLBACKS.get(kind, kind)
    return fallback if columns % fallback.block_elements == 0 else GGMLType.F16


class _Rules:
    """A preset's choices for one model."""

    def __init__(self, source: Source, preset: str, has_importance: bool) -> None:
        def value(key: str) -> int:
            found = source.metadata.get(f"{source.architecture}.{key}", 0)
            return found if isinstance(found, int) else 0

        names = [target.name for target in source.targets]
        self.preset = preset
        self.base = PRESETS[preset].base
        self.has_importance = has_importance
        self.layers = value("block_count")
        self.experts = value("expert_count")
        self.heads_per_kv_head = value("attention.head_count") // max(
            value("attention.head_count_kv"), 1
        )
        self.tied = "output.weight" not in names
        self.values = sorted(
            (name for name in names if re.search(r"attn_(v|kv_b)\.weight", name)), key=_layer
        )

    def choose(self, target: Target) -> GGMLType:
        return fitting_type(self._wanted(target), target.columns)

    def _wanted(self, target: Target) -> GGMLType:
        name = target.name
        if self.base in FLOATS:
            return self.base
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return self._output(target)
        if self.preset == "MXFP4_MOE":
            return GGMLType.MXFP4 if target.matrices > 1 else GGMLType.Q8_0
        rules: list[tuple[str, Callable[[str], GGMLType | None]]] = [
            (r"attn_(v|kv_b)\.weight", self._value),
            (r"attn_k\.weight", self._key),
            (r"ffn_down", self._down),
            (r"attn_output\.weight", self._attention_output),
        ]
        for pattern, rule in rules:
            if re.search(pattern, name):
                return rule(name) or self.base
        return self.base

    def _output(self, target: Target) -> GGMLType:
        if self.preset == "MXFP4_MOE" or target.columns % self.base.block_elements:
            return GGMLType.Q8_0
        return GGMLType.Q8_0 if self.base is GGMLType.Q8_0 else GGMLType.Q6_K

    def _value(self, name: str) -> GGMLType | None:
        if self.experts == 8:
            return GGMLType.Q8_0
        index = self.values.index(name)
        shared = self.heads_per_kv_head >= 4
        more = _more_bits(index, len(self.values))
        return {
            "Q2_K": GGMLType.Q4_K if shared else GGMLType.Q3_K,
            "Q3_K_M": GGMLType.Q5_K if index < 2 else GGMLType.Q4_K,
            "Q3_K_L": GGMLType.Q5_K,
            "Q4_K_S": GGMLType.Q5_K if index < 4 else None,
            "Q4_K_M": GGMLType.Q6_K if more else None,
            "Q5_K_M": GGMLType.Q6_K if more else None,
            "IQ4_NL": GGMLType.Q5_K if shared else None,
            "IQ4_XS": GGMLType.Q5_K if shared else None,
        }.get(self.preset)

    def _key(self, _name: str) -> GGMLType | None:
        return GGMLType.Q8_0 if self.experts == 8 else None

    def _down(self, name: str) -> GGMLType | None:
        layer, layers = _layer(name), self.layers
        first = layer < layers // 8
        unguided = first and not self.has_importance
        guided = first and self.has_importance
        more = _more_bits(layer, layers)
        return {
            "Q2_K": GGMLType.Q3_K,
            "Q3_K_M": GGMLType.Q5_K if layer < layers // 16 else GGMLType.Q4_K,
            "Q3_K_L": GGMLType.Q5_K,
            "Q4_K_S": GGMLType.Q5_K if first else None,
            "Q4_K_M": GGMLType.Q6_K if more else None,
            "Q5_K_M": GGMLType.Q6_K if more else None,
            "IQ4_NL": GGMLType.Q5_K if unguided else None,
            "IQ4_XS": GGMLType.Q5_K if unguided else None,
            "Q4_0": GGMLType.Q4_1 if guided else None,
            "Q5_0": GGMLType.Q5_1 if guided else None,
        }.get(self.preset)

    def _attention_output(self, _name: str) -> GGMLType | None:
        if self.experts == 8:
            low = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return GGMLType.Q5_K if self.preset in low else None
        return {
            "Q2_K": GGMLType.Q3_K,
            "Q3_K_M": GGMLType.Q4_K,
            "Q3_K_L": GGMLType.Q5_K,
        }.get(self.preset)


def _more_bits(index: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    first = count // 8
    return index < first or index >= 7 * count // 8 or (index - first) % 3 == 2


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1

"""How a checkpoint says that its weights are quantized: config.json's quantization_config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.config import CheckpointError

if TYPE_CHECKING:
    from convert.config import Config

FLOAT_FORMATS = ("float-quantized", "naive-quantized")
PACKED_FORMAT = "pack-quantized"


@dataclass(frozen=True, slots=True)
class Packing:
    """Integers of `bits` in words; `group` columns share a scale, all of a row if it is None."""

    bits: int
    group: int | None
    symmetric: bool


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the tensors alone do not say.

    `blocks` are the sizes [rows, columns] that a scale of 8-bit floats may stand for, `packings`
    the forms that packed integers may have.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    packings: tuple[Packing, ...] = ()


def read_quantization(config: Config) -> Quantization:
    """Read quantization_config. Raises `CheckpointError` for methods that convert cannot undo."""
    if "quantization_config" not in config:
        return Quantization()
    section = config.section("quantization_config")
    match section.text("quant_method", ""):
        case "fp8":
            return Quantization(blocks=_block(section, "weight_block_size"))
        case "compressed-tensors":
            return _compressed(section)
        case method:
            raise CheckpointError(
                f"config.json: quantization_config has quant_method {method!r}; convert undoes "
                "fp8 and compressed-tensors, so take the checkpoint as it was before quantization"
            )


def _compressed(section: Config) -> Quantization:
    blocks: list[tuple[int, int]] = []
    packings: list[Packing] = []
    for name in section.section("config_groups"):
        group = section.section("config_groups").section(name)
        kind = group.text("format", section.text("format", ""))
        weights = group.section("weights")
        if kind == PACKED_FORMAT:
            packings.append(_packing(weights))
        elif kind in FLOAT_FORMATS and weights.text("type", "") == "float":
            blocks += _block(weights, "block_structure")
        else:
            raise CheckpointError(
                f"config.json: quantization_config has weights of format {kind!r} and type "
                f"{weights.text('type', '')!r}; of compressed-tensors, convert undoes "
                f"{PACKED_FORMAT} and 8-bit floats ({', '.join(FLOAT_FORMATS)})"
            )
    return Quantization(tuple(blocks), tuple(packings))


def _packing(weights: Config) -> Packing:
    bits, strategy = weights.integer("num_bits"), weights.text("strategy", "group")
    if bits not in (4, 8) or strategy not in ("group", "channel"):
        raise CheckpointError(
            f"config.json: quantization_config has integers of {bits} bits with a scale per "
            f"{strategy}; convert unpacks 4 and 8 bits with a scale per group or channel"
        )
    group = weights.integer("group_size") if strategy == "group" else None
    if group is not None and group < 1:
        raise CheckpointError(f"config.json: quantization_config has group_size {group}")
    return Packing(bits, group, weights.flag("symmetric", default=True))


def _block(section: Config, key: str) -> tuple[tuple[int, int], ...]:
    if key not in section:
        return ()
    size = section.integers(key)
    if len(size) != 2 or min(size) < 1:
        raise CheckpointError(
            f"config.json: quantization_config has {key} {size}; expected rows and columns"
        )
    return ((size[0], size[1]),)

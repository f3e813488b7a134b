"""Rotary position embedding: frequencies from a model's metadata, with YaRN and linear scaling.

YaRN: Peng et al., arXiv:2309.00071; DeepSeek's use of it and the mscale rule: DeepSeek-V2's
modeling file (`mscale`, `mscale_all_dim`). GGUF stores 0.1 * mscale_all_dim as
`rope.scaling.yarn_log_multiplier`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localds.gguf import GGUFError
from localds.ops import Rope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from localds.gguf import GGUFFile


@dataclass(frozen=True, slots=True)
class Scaling:
    """What `rope.scaling.*` says. `log_multiplier` is mscale_all_dim, 0 where the file has none."""

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    log_multiplier: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


def read_scaling(gguf: GGUFFile, context_length: int) -> Scaling:
    """Read `<architecture>.rope.scaling.*`.

    Raises `GGUFError` for a scaling type that is not none, linear or yarn, or a factor below 1.
    """
    prefix = f"{gguf.architecture}.rope.scaling."
    kind = gguf.text(prefix + "type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise GGUFError(
            f"{gguf.path}: {prefix}type is {kind!r}; localds computes none, linear and yarn"
        )
    if kind == "none":
        return Scaling()
    factor = gguf.number(prefix + "factor", 1.0)
    original = gguf.integer(prefix + "original_context_length", context_length)
    if not 1.0 <= factor < math.inf or original < 1:
        raise GGUFError(
            f"{gguf.path}: {prefix}factor is {factor} and original_context_length {original}; "
            "both must be at least 1"
        )
    return Scaling(
        kind=kind,
        factor=factor,
        original_context=original,
        log_multiplier=10.0 * gguf.number(prefix + "yarn_log_multiplier", 0.0),
        beta_fast=gguf.number(prefix + "yarn_beta_fast", 32.0),
        beta_slow=gguf.number(prefix + "yarn_beta_slow", 1.0),
        attention_factor=gguf.number(prefix + "attn_factor", 1.0),
    )


def make_rope(width: int, base: float, scaling: Scaling) -> Rope:
    """Frequencies for `width` rotated elements and the amplitude of cosine and sine."""
    frequencies = base ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    if scaling.kind == "yarn":
        ramp = _yarn_ramp(width, base, scaling)
        frequencies = frequencies * (1.0 - ramp) + frequencies / scaling.factor * ramp
    return Rope(frequencies.astype(np.float32), _amplitude(scaling))


def softmax_scale(key_width: int, scaling: Scaling) -> float:
    """1 / sqrt(key_width), times YaRN's squared mscale where the file has a log multiplier.

    V2-Lite (192, factor 40, mscale_all_dim 0.707) gives 0.114721, V3 (mscale_all_dim 1) 0.135234.
    """
    scale = 1.0 / math.sqrt(key_width)
    if scaling.kind != "yarn" or scaling.log_multiplier == 0.0:
        return scale
    mscale = _amplitude(scaling) * _mscale(scaling.factor, scaling.log_multiplier)
    return scale * mscale * mscale


def _mscale(factor: float, multiplier: float) -> float:
    return 1.0 + 0.1 * multiplier * math.log(factor)


def _amplitude(scaling: Scaling) -> float:
    """The rule for files with a log multiplier assumes mscale == mscale_all_dim, as published."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.log_multiplier == 0.0:
        return scaling.attention_factor * _mscale(scaling.factor, 1.0)
    return scaling.attention_factor


def _yarn_ramp(width: int, base: float, scaling: Scaling) -> NDArray[np.float64]:
    """Share of the interpolated frequency for each pair: 0 for fast pairs, 1 for slow ones."""

    def pair_of(rotations: float) -> float:
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), width - 1)
    span = max(high - low, 0.001)
    return np.clip((np.arange(width // 2) - low) / span, 0.0, 1.0)

"""PEFT's adapter_config.json: what is read from it, and what is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from localds.adapters.adapter import AdapterError
from localds.finetune.config import AdapterConfig, Method

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 16 << 20
# Each changes what the pairs mean, or puts something beside them.
_REFUSED = (
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_REPEATS = 3


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields that matter. Patterns are regular expressions for the ends of modules' names."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    base_model: str | None
    revision: str | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def rank_of(self, *modules: str) -> int:
        """The rank of a module, which may have more than one name."""
        return int(_look_up(self.rank_pattern, modules, self.rank))

    def scale_of(self, *modules: str) -> float:
        """What the product of a module's pair is multiplied by."""
        rank = self.rank_of(*modules)
        alpha = _look_up(self.alpha_pattern, modules, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def adapter_config(self, targets: tuple[str, ...]) -> AdapterConfig:
        """The same as a training run has it."""
        method: Method = "dora" if self.dora else "rslora" if self.rslora else "lora"
        alpha = self.alpha
        if self.dora and self.rslora:
            alpha *= math.sqrt(self.rank)  # the scale of DoRA is alpha / rank here
        return AdapterConfig(self.rank, alpha, method, targets, self.dropout)


def read_config(folder: Path) -> PeftConfig:
    """Read and check a folder's configuration; raises `AdapterError` naming what is wrong."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder}: there is no {CONFIG_FILE}; an adapter folder of PEFT has one"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise AdapterError(f"{path}: {path.stat().st_size} bytes are too many for a configuration")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: it is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: it holds no object")
    try:
        return _read(values)
    except (ValueError, OverflowError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _read(values: dict[str, Any]) -> PeftConfig:
    _check_kind(values)
    config = PeftConfig(
        rank=_integer("r", values.get("r", 8)),
        alpha=_number("lora_alpha", values.get("lora_alpha", 8)),
        rslora=_switch(values, "use_rslora"),
        dora=_switch(values, "use_dora"),
        dropout=_number("lora_dropout", values.get("lora_dropout", 0.0)),
        base_model=_text(values, "base_model_name_or_path"),
        revision=_text(values, "revision"),
        rank_pattern={
            _pattern(key): _integer(f"rank_pattern of {key!r}", rank)
            for key, rank in _mapping(values, "rank_pattern").items()
        },
        alpha_pattern={
            _pattern(key): _number(f"alpha_pattern of {key!r}", alpha)
            for key, alpha in _mapping(values, "alpha_pattern").items()
        },
    )
    if not config.adapter_config(("q_proj",)).scale:
        raise ValueError(f"lora_alpha is {config.alpha}, too small for rank {config.rank}")
    return config


def _check_kind(values: dict[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r}; localds reads LORA (rsLoRA and DoRA are so, too)")
    for key in _REFUSED:
        if values.get(key):
            raise ValueError(
                f"{key} is {values[key]!r}, which localds cannot apply; train without it, or merge "
                "the adapter with PEFT and convert the merged checkpoint"
            )
    if values.get("bias", "none") != "none":
        raise ValueError(f"bias is {values['bias']!r}; localds reads adapters without biases")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights is {init!r}, which changes the model's own weights; save it in "
            "PEFT with path_initial_model_for_weight_conversion"
        )


def _look_up(patterns: dict[str, Any], modules: tuple[str, ...], default: float) -> float:
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules):
            return float(value)
    return default


def _pattern(key: str) -> str:
    """A pattern that takes no long time to match, which some expressions would."""
    repeats = len(re.findall(r"[*+{]", key))
    if repeats > _MAX_REPEATS or re.search(r"\)\s*[*+{]", key) or len(key) > 1000:
        raise ValueError(f"the pattern {key[:80]!r} is too complicated; write modules' full names")
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(f"{key[:80]!r} is no regular expression ({error})") from None
    return key


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} is {found!r}, no object")
    return found


def _integer(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 16:
        raise ValueError(f"{key} is {value!r}; it must be a whole number from 1 on")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}, no finite number")
    return float(value)


def _switch(values: dict[str, Any], key: str) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, neither true nor false")
    return value


def _text(values: dict[str, Any], key: str) -> str | None:
    value = values.get(key) or None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}, no text")
    return value

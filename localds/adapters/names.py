"""What adapters can change: names of tensors in GGUF files and of modules in checkpoints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from localds.finetune.config import EXPERTS, ROUTER, TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ATTENTION: Mapping[str, Mapping[str, str]] = {
    "deepseek2": {
        "attn_q": "q_proj",
        "attn_q_a": "q_a_proj",
        "attn_q_b": "q_b_proj",
        "attn_kv_a_mqa": "kv_a_proj_with_mqa",
        "attn_kv_b": "kv_b_proj",
        "attn_output": "o_proj",
    },
    "llama": {
        "attn_q": "q_proj",
        "attn_k": "k_proj",
        "attn_v": "v_proj",
        "attn_output": "o_proj",
    },
}
"""Projections of attention by architecture: the names in a file, and those in a checkpoint."""

GATE, UP, DOWN = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
FUSED = "ffn_gate_up_exps"
EXPERT_NAMES: Mapping[str, Mapping[str, str]] = {
    "deepseek2": {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"},
    "llama": {GATE: "w1", UP: "w3", DOWN: "w2"},
}
"""The matrices of one routed expert, where a checkpoint has a module for each expert."""

ROUTER_NAME = "ffn_gate_inp"
INTERLEAVED: Mapping[str, tuple[str, ...]] = {"deepseek2": (), "llama": ("attn_q", "attn_k")}
"""Projections whose rows a file has in another order: rotated values in pairs, not in halves."""

_FEED_FORWARD = {
    **{f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")},
    **{f"ffn_{kind}_shexp": f"mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down")},
}


def split_name(name: str) -> tuple[int, str]:
    """Layer and kind of a name in a tree: "blk.3.attn_q" is (3, "attn_q"); (-1, name) if none."""
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def module_of(architecture: str, kind: str) -> str:
    """The module in a checkpoint's layer that a kind stands for, such as "self_attn.q_proj".

    Of routed experts, the module that holds all of them.
    """
    if kind in ATTENTION[architecture]:
        return f"self_attn.{ATTENTION[architecture][kind]}"
    if kind == ROUTER_NAME:
        return "mlp.gate"
    if kind in (GATE, UP, DOWN):
        return "mlp.experts"
    return _FEED_FORWARD[kind]


def kind_of(architecture: str, module: str) -> str | None:
    """The opposite of `module_of`, for modules that are one matrix; None for others."""
    kinds = [*ATTENTION[architecture], *_FEED_FORWARD, ROUTER_NAME]
    return next((kind for kind in kinds if module_of(architecture, kind) == module), None)


def targets_of(architecture: str, names: Iterable[str]) -> tuple[str, ...]:
    """Which of `TARGETS` the tensors of a tree belong to, in their order."""
    found = set()
    for name in names:
        kind = split_name(name)[1]
        if kind in (GATE, UP, DOWN):
            found.add(EXPERTS)
        elif kind == ROUTER_NAME:
            found.add(ROUTER)
        else:
            found.add(module_of(architecture, kind).rpartition(".")[2])
    return tuple(target for target in TARGETS if target in found)

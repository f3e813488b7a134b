"""Checkpoint tensors to GGUF tensors: which, under what names, in what order.

A plan is made from names and shapes alone; data is read a block of rows at a time when it is
written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.checkpoint import CheckpointError
from convert.metadata import leading_dense_layers, model_class
from convert.planner import Planner

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint, Config
    from convert.source import Target

# Frequencies that old checkpoints store although they follow from the config.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")


def plan(checkpoint: Checkpoint) -> list[Target]:
    """All GGUF tensors of a checkpoint, in the order of the layers.

    Multi-token-prediction layers (beyond num_hidden_layers) are left out. Raises `CheckpointError`
    for a missing tensor, a shape that does not fit, or tensors that no GGUF tensor takes.
    """
    config = checkpoint.config
    planner = Planner(checkpoint)
    table = (config.integer("vocab_size"), config.integer("hidden_size"))
    planner.copy("model.embed_tokens.weight", "token_embd.weight", table)
    mixtral = model_class(config) == "MixtralForCausalLM"
    for layer in range(config.integer("num_hidden_layers")):
        if mixtral:
            _mixtral_layer(planner, config, layer)
        else:
            _deepseek2_layer(planner, config, layer)
    planner.copy("model.norm.weight", "output_norm.weight", table[1:])
    if config.flag("tie_word_embeddings", default=False):
        planner.used.add("lm_head.weight")
    else:
        planner.copy("lm_head.weight", "output.weight", table)
    _check_leftovers(planner, config)
    return planner.targets


def _deepseek2_layer(planner: Planner, config: Config, layer: int) -> None:
    hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
    hidden = config.integer("hidden_size")
    planner.copy(hf + "input_layernorm.weight", gguf + "attn_norm.weight", (hidden,))
    _latent_attention(planner, config, hf + "self_attn.", gguf)
    planner.copy(hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight", (hidden,))
    if layer < leading_dense_layers(config):
        width = config.integer("intermediate_size")
        _swiglu(planner, hf + "mlp.{}_proj.weight", gguf + "ffn_{}.weight", hidden, width)
    else:
        _deepseek_experts(planner, config, hf + "mlp.", gguf)


def _latent_attention(planner: Planner, config: Config, hf: str, gguf: str) -> None:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value, rank = config.integer("v_head_dim"), config.integer("kv_lora_rank")
    query = heads * (nope + rope)
    if "q_lora_rank" in config:
        query_rank = config.integer("q_lora_rank")
        planner.copy(hf + "q_a_proj.weight", gguf + "attn_q_a.weight", (query_rank, hidden))
        planner.copy(hf + "q_a_layernorm.weight", gguf + "attn_q_a_norm.weight", (query_rank,))
        planner.copy(hf + "q_b_proj.weight", gguf + "attn_q_b.weight", (query, query_rank))
    else:
        planner.copy(hf + "q_proj.weight", gguf + "attn_q.weight", (query, hidden))
    latent = (rank + rope, hidden)
    planner.copy(hf + "kv_a_proj_with_mqa.weight", gguf + "attn_kv_a_mqa.weight", latent)
    planner.copy(hf + "kv_a_layernorm.weight", gguf + "attn_kv_a_norm.weight", (rank,))
    halves = (gguf + "attn_k_b.weight", gguf + "attn_v_b.weight")
    planner.latent_halves(hf + "kv_b_proj.weight", halves, heads, nope, value, rank)
    planner.copy(hf + "o_proj.weight", gguf + "attn_output.weight", (hidden, heads * value))


def _deepseek_experts(planner: Planner, config: Config, hf: str, gguf: str) -> None:
    hidden, width = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    count, shared = config.integer("n_routed_experts"), config.integer("n_shared_experts", 0)
    planner.copy(hf + "gate.weight", gguf + "ffn_gate_inp.weight", (count, hidden))
    if planner.has(hf + "gate.e_score_correction_bias"):
        planner.copy(hf + "gate.e_score_correction_bias", gguf + "exp_probs_b.bias", (count,))
    experts = _Experts(count, hidden, width)
    projections = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    _routed(planner, experts, hf + "experts.{}.", projections, gguf)
    if shared:
        source, name = hf + "shared_experts.{}_proj.weight", gguf + "ffn_{}_shexp.weight"
        _swiglu(planner, source, name, hidden, shared * width)


def _mixtral_layer(planner: Planner, config: Config, layer: int) -> None:
    hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    width = config.integer("head_dim", hidden // heads)
    if width % 2:
        raise CheckpointError(f"config.json: heads are {width} wide; rotation needs an even width")
    keys = config.integer("num_key_value_heads", heads)
    attention = hf + "self_attn."
    planner.copy(hf + "input_layernorm.weight", gguf + "attn_norm.weight", (hidden,))
    for projection, count in (("q", heads), ("k", keys)):
        source, name = f"{attention}{projection}_proj.weight", f"{gguf}attn_{projection}.weight"
        planner.interleave(source, name, count, (count * width, hidden))
    planner.copy(attention + "v_proj.weight", gguf + "attn_v.weight", (keys * width, hidden))
    planner.copy(attention + "o_proj.weight", gguf + "attn_output.weight", (hidden, heads * width))
    planner.copy(hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight", (hidden,))
    experts = _Experts(
        config.integer("num_local_experts"), hidden, config.integer("intermediate_size")
    )
    moe = hf + "block_sparse_moe."
    planner.copy(moe + "gate.weight", gguf + "ffn_gate_inp.weight", (experts.count, hidden))
    _routed(planner, experts, moe + "experts.{}.", {"gate": "w1", "up": "w3", "down": "w2"}, gguf)


def _swiglu(planner: Planner, source: str, name: str, hidden: int, width: int) -> None:
    """The three matrices of a gated network; the patterns take gate, up, down."""
    for projection in ("gate", "up", "down"):
        shape = (hidden, width) if projection == "down" else (width, hidden)
        planner.copy(source.format(projection), name.format(projection), shape)


@dataclass(frozen=True, slots=True)
class _Experts:
    count: int
    hidden: int
    width: int

    @property
    def inward(self) -> tuple[int, int, int]:
        """Shape of the gates' and the ups' stack."""
        return (self.count, self.width, self.hidden)

    @property
    def outward(self) -> tuple[int, int, int]:
        """Shape of the downs' stack."""
        return (self.count, self.hidden, self.width)


def _routed(
    planner: Planner, experts: _Experts, hf: str, projections: dict[str, str], gguf: str
) -> None:
    for kind, projection in projections.items():
        shape = experts.outward if kind == "down" else experts.inward
        planner.stack(f"{hf}{projection}.weight", f"{gguf}ffn_{kind}_exps.weight", shape)


def _check_leftovers(planner: Planner, config: Config) -> None:
    """Every tensor must have been taken: one that was not means another architecture."""
    layers = config.integer("num_hidden_layers")
    left = [
        name
        for name in planner.checkpoint.tensors
        if name not in planner.used and not DERIVED.search(name) and _layer_of(name) < layers
    ]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise CheckpointError(
            f"{planner.checkpoint.folder}: convert does not know what to do with "
            f"{', '.join(left[:5])}{more}; the model is not what config.json says it is"
        )


def _layer_of(name: str) -> int:
    """The layer number in a tensor's name; -1 outside of the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1

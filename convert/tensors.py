"""Checkpoint tensors to GGUF tensors: which, under what names, in what order.

A plan is made from names and shapes alone; data is read a block of rows at a time when it is
written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from convert.checkpoint import CheckpointError
from convert.metadata import leading_dense_layers, model_class
from convert.planner import Planner

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint, Config
    from convert.source import Target

# Frequencies that old checkpoints store although they follow from the config, and scales of
# activations and caches, which have no part in the weights.
UNUSED = re.compile(r"(rotary_emb\.inv_freq|\.(input|activation|k|v)_scale)$")

PREFIXES = {"KimiK25ForConditionalGeneration": "language_model."}
"""What stands before the names of the language model's tensors, where there are others."""
OTHER_PARTS = {"KimiK25ForConditionalGeneration": ("vision_tower.", "mm_projector.")}
"""Names of what belongs to other inputs than text begin so."""


def plan(checkpoint: Checkpoint, *, mtp: bool = False) -> list[Target]:
    """All GGUF tensors of a checkpoint, in the order of the layers.

    Multi-token-prediction layers, which follow the others, are kept with `mtp` only. Raises
    `CheckpointError` for a missing tensor, a shape that does not fit, or tensors that no GGUF
    tensor takes.
    """
    config, kind = checkpoint.text, model_class(checkpoint.config)
    planner = Planner(checkpoint, PREFIXES.get(kind, ""))
    table = (config.integer("vocab_size"), config.integer("hidden_size"))
    planner.copy("model.embed_tokens.weight", "token_embd.weight", table)
    add_layer = _mixtral_layer if kind == "MixtralForCausalLM" else _deepseek2_layer
    layers = config.integer("num_hidden_layers")
    for layer in range(layers):
        add_layer(planner, config, layer)
    for layer in range(layers, layers + (_extra_layers(config) if mtp else 0)):
        add_layer(planner, config, layer)
        _prediction_tensors(planner, config, layer)
    planner.copy("model.norm.weight", "output_norm.weight", table[1:])
    if config.flag("tie_word_embeddings", default=False):
        planner.used.add(planner.prefix + "lm_head.weight")
    else:
        planner.copy("lm_head.weight", "output.weight", table)
    _check_leftovers(planner, [*_omitted(checkpoint, mtp=mtp).values()])
    return planner.targets


def omissions(checkpoint: Checkpoint, *, mtp: bool = False) -> list[str]:
    """A line for each part of the checkpoint that the plan leaves out, with its size."""
    lines = []
    for part, names in _omitted(checkpoint, mtp=mtp).items():
        size = sum(checkpoint.tensors[name].nbytes for name in names)
        lines.append(f"left out: {part} ({size / 1e9:.2f} GB of the checkpoint)")
    return lines


def _omitted(checkpoint: Checkpoint, *, mtp: bool) -> dict[str, list[str]]:
    """The names of the tensors that are left out, by a description of the part."""
    kind, layers = model_class(checkpoint.config), checkpoint.text.integer("num_hidden_layers")
    prefix, others = PREFIXES.get(kind, ""), OTHER_PARTS.get(kind)
    extra = {name: _layer_of(name.removeprefix(prefix)) for name in checkpoint.tensors}
    extra = {name: layer for name, layer in extra.items() if layer >= layers}
    parts: dict[str, list[str]] = {}
    if extra and not mtp:
        numbers = ", ".join(str(layer) for layer in sorted(set(extra.values())))
        parts[f"multi-token prediction, layer {numbers}; --mtp keeps it"] = list(extra)
    if others:
        vision = [name for name in checkpoint.tensors if name.startswith(others)]
        if vision:
            parts["what sees images"] = vision
    return parts


def _extra_layers(config: Config) -> int:
    count = config.integer("num_nextn_predict_layers", 0)
    if count < 1:
        raise CheckpointError(
            "config.json names no multi-token-prediction layers (num_nextn_predict_layers); "
            "leave out --mtp"
        )
    return count


def _prediction_tensors(planner: Planner, config: Config, layer: int) -> None:
    """What a multi-token-prediction layer has besides a layer; its embedding comes first."""
    hf, gguf = f"model.layers.{layer}.", f"blk.{layer}.nextn."
    hidden = config.integer("hidden_size")
    table = (config.integer("vocab_size"), hidden)
    planner.copy(hf + "eh_proj.weight", gguf + "eh_proj.weight", (hidden, 2 * hidden))
    planner.copy(hf + "enorm.weight", gguf + "enorm.weight", (hidden,))
    planner.copy(hf + "hnorm.weight", gguf + "hnorm.weight", (hidden,))
    for source, name, shape in (
        ("embed_tokens.weight", "embed_tokens.weight", table),
        ("shared_head.head.weight", "shared_head_head.weight", table),
        ("shared_head.norm.weight", "shared_head_norm.weight", (hidden,)),
    ):
        if planner.has(hf + source):
            planner.copy(hf + source, gguf + name, shape)


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
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    _routed(planner, hf + "experts.", gguf, names, (count, width, hidden))
    if shared:
        source, name = hf + "shared_experts.{}_proj.weight", gguf + "ffn_{}_shexp.weight"
        _swiglu(planner, source, name, hidden, shared * width)


def _mixtral_layer(planner: Planner, config: Config, layer: int) -> None:
    hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    width = config.integer("head_dim", hidden // max(1, heads))
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
    count, inner = config.integer("num_local_experts"), config.integer("intermediate_size")
    # transformers renames the block, and may save it so.
    moe = hf + ("mlp." if planner.has(hf + "mlp.gate.weight") else "block_sparse_moe.")
    planner.copy(moe + "gate.weight", gguf + "ffn_gate_inp.weight", (count, hidden))
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    _routed(planner, moe + "experts.", gguf, names, (count, inner, hidden))


def _swiglu(planner: Planner, source: str, name: str, hidden: int, width: int) -> None:
    """The three matrices of a gated network; the patterns take gate, up, down."""
    for projection in ("gate", "up", "down"):
        shape = (hidden, width) if projection == "down" else (width, hidden)
        planner.copy(source.format(projection), name.format(projection), shape)


def _routed(
    planner: Planner, hf: str, gguf: str, names: dict[str, str], shape: tuple[int, int, int]
) -> None:
    """The experts of a layer: a matrix for each, or already stacked as transformers holds them.

    `shape` is (experts, width, hidden), `names` what a single expert's matrices are called.
    """
    count, width, hidden = shape
    inward, outward = shape, (count, hidden, width)
    gate, up, down = (gguf + f"ffn_{kind}_exps.weight" for kind in ("gate", "up", "down"))
    if planner.has(hf + "gate_up_proj"):
        planner.split(hf + "gate_up_proj", (gate, up), inward)
        planner.copy(hf + "down_proj", down, outward)
        return
    planner.stack(f"{hf}{{}}.{names['gate']}.weight", gate, inward)
    planner.stack(f"{hf}{{}}.{names['up']}.weight", up, inward)
    planner.stack(f"{hf}{{}}.{names['down']}.weight", down, outward)


def _check_leftovers(planner: Planner, omitted: list[list[str]]) -> None:
    """Every tensor must have been taken: one that was not means another architecture."""
    known = planner.used.union(*omitted)
    names = planner.checkpoint.tensors
    left = [name for name in names if name not in known and not UNUSED.search(name)]
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

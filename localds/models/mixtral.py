"""Mixtral, GGUF architecture `llama` with experts (arXiv:2401.04088).

Grouped-query attention, and top-k routing by a softmax over the chosen experts' logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from localds.gguf import GGUFError
from localds.models.decoder import Decoder, Layer, assemble
from localds.models.geometry import Geometry
from localds.models.rope import Scaling, make_rope, read_scaling
from localds.models.weights import Weights
from localds.ops import Gating, GqaShape, GqaWeights, MoeWeights, Ops, Router

if TYPE_CHECKING:
    from localds.gguf import GGUFFile

X = TypeVar("X")


@dataclass(frozen=True, slots=True)
class Config:
    """The metadata of a `llama` file with experts; names follow the checkpoint's config.json."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotated: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Scaling
    router: Router


def read_config(gguf: GGUFFile) -> Config:
    """Read and check the metadata. Raises `GGUFError` naming the key that does not fit."""
    key = "llama."
    experts = gguf.integer(key + "expert_count", 0)
    if experts == 0:
        raise GGUFError(
            f"{gguf.path}: a 'llama' model without experts; of this architecture localds runs only "
            "mixtures of experts (Mixtral)"
        )
    heads = gguf.integer(key + "attention.head_count")
    hidden = gguf.integer(key + "embedding_length")
    context = gguf.integer(key + "context_length")
    if heads < 1 or hidden < 1 or context < 1:
        raise GGUFError(
            f"{gguf.path}: llama.attention.head_count is {heads}, embedding_length {hidden} and "
            f"context_length {context}; each must be at least 1"
        )
    head = gguf.integer(key + "attention.key_length", hidden // heads)
    config = Config(
        hidden_size=hidden,
        num_layers=gguf.integer(key + "block_count"),
        vocab_size=Weights(gguf)["token_embd"].shape[-1],
        max_position_embeddings=context,
        num_attention_heads=heads,
        num_key_value_heads=gguf.integer(key + "attention.head_count_kv", heads),
        head_dim=head,
        rotated=gguf.integer(key + "rope.dimension_count", head),
        rms_norm_eps=gguf.number(key + "attention.layer_norm_rms_epsilon"),
        rope_theta=gguf.number(key + "rope.freq_base", 10000.0),
        rope_scaling=read_scaling(gguf, context),
        router=Router(
            n_experts=experts,
            top_k=gguf.integer(key + "expert_used_count"),
            gating=Gating.SOFTMAX,
            normalize=True,
            scale=1.0,
        ),
    )
    _check(gguf, config)
    return config


def geometry(config: Config) -> Geometry:
    """The sizes that plans and `inspect` need."""
    kept = 2 * config.num_key_value_heads * config.head_dim
    return Geometry(
        architecture="llama",
        layers=config.num_layers,
        dense_layers=0,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        context_length=config.max_position_embeddings,
        heads=config.num_attention_heads,
        experts=config.router.n_experts,
        experts_used=config.router.top_k,
        experts_shared=0,
        cache_width=kept,
        expanded_width=2 * config.num_attention_heads * config.head_dim,
    )


def build(gguf: GGUFFile, ops: Ops[X]) -> Decoder[X]:
    """Prepare the model in `gguf` on a device. Raises `GGUFError` for what does not fit."""
    config = read_config(gguf)
    weights = Weights(gguf)
    shape = GqaShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head=config.head_dim,
        softmax_scale=1.0 / math.sqrt(config.head_dim),
        eps=config.rms_norm_eps,
        rope=make_rope(config.rotated, config.rope_theta, config.rope_scaling),
    )
    layers = [
        Layer(
            attention=ops.gqa(_attention_weights(weights.block(i)), shape),
            feed_forward=ops.moe(
                _expert_weights(weights.block(i)), config.router, config.rms_norm_eps
            ),
        )
        for i in range(config.num_layers)
    ]
    return assemble(geometry(config), weights, layers, ops, config.rms_norm_eps)


def _attention_weights(block: Weights) -> GqaWeights:
    return GqaWeights(
        norm=block["attn_norm"],
        q=block["attn_q"],
        k=block["attn_k"],
        v=block["attn_v"],
        output=block["attn_output"],
    )


def _expert_weights(block: Weights) -> MoeWeights:
    return MoeWeights(
        norm=block["ffn_norm"],
        router=block["ffn_gate_inp"],
        gate=block["ffn_gate_exps"],
        up=block["ffn_up_exps"],
        down=block["ffn_down_exps"],
    )


def _check(gguf: GGUFFile, config: Config) -> None:
    """Reject figures that no tensor shape would catch later."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise GGUFError(
            f"{gguf.path}: llama.attention.head_count is {heads} and head_count_kv {kv_heads}; "
            "query heads must be a multiple of key-value heads"
        )
    if config.rotated < 2 or config.rotated % 2 or config.rotated > config.head_dim:
        raise GGUFError(
            f"{gguf.path}: llama.rope.dimension_count is {config.rotated}; it must be even and at "
            f"most the head width {config.head_dim}"
        )

"""DeepSeek-V2 and its family, GGUF architecture `deepseek2`.

Covers V2-Lite, V2, V2.5, V3, R1, V3.1, Kimi-K2, Moonlight, GLM-4.7-Flash and files like them:
multi-head latent attention (arXiv:2405.04434) and DeepSeekMoE with softmax or sigmoid routing
(arXiv:2412.19437, 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from localds.gguf import GGUFError
from localds.models.decoder import Decoder, Layer, assemble
from localds.models.geometry import Geometry
from localds.models.rope import Scaling, make_rope, read_scaling, softmax_scale
from localds.models.weights import Weights
from localds.ops import (
    FfnWeights,
    Gating,
    GroupScore,
    MlaShape,
    MlaWeights,
    MoeWeights,
    Ops,
    Router,
)

if TYPE_CHECKING:
    from localds.gguf import GGUFFile
    from localds.ops import FeedForward

X = TypeVar("X")

# The models' code leaves the norms of the latents at its default, whatever rms_norm_eps says.
LATENT_EPS = 1e-6
GATING = {1: Gating.SOFTMAX, 2: Gating.SIGMOID, 3: Gating.SOFTMAX_SELECTED}


@dataclass(frozen=True, slots=True)
class Config:
    """The metadata of a `deepseek2` file; names follow the checkpoint's config.json."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    max_position_embeddings: int
    num_attention_heads: int
    rms_norm_eps: float
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    rope_scaling: Scaling
    first_k_dense_replace: int
    n_shared_experts: int
    router: Router | None


def read_config(gguf: GGUFFile) -> Config:
    """Read and check the metadata. Raises `GGUFError` naming the key that does not fit."""
    key = "deepseek2."
    layers = gguf.integer(key + "block_count") - gguf.integer(key + "nextn_predict_layers", 0)
    context = gguf.integer(key + "context_length")
    rope_width = gguf.integer(key + "rope.dimension_count")
    # The _mla keys hold the true head widths; files from before them have those in the plain keys.
    key_width = gguf.integer(key + "attention.key_length_mla", 0) or gguf.integer(
        key + "attention.key_length"
    )
    value_width = gguf.integer(key + "attention.value_length_mla", 0) or gguf.integer(
        key + "attention.value_length"
    )
    experts = gguf.integer(key + "expert_count", 0)
    config = Config(
        hidden_size=gguf.integer(key + "embedding_length"),
        num_layers=layers,
        vocab_size=_vocab_size(gguf),
        max_position_embeddings=context,
        num_attention_heads=gguf.integer(key + "attention.head_count"),
        rms_norm_eps=gguf.number(key + "attention.layer_norm_rms_epsilon"),
        kv_lora_rank=gguf.integer(key + "attention.kv_lora_rank"),
        qk_nope_head_dim=key_width - rope_width,
        qk_rope_head_dim=rope_width,
        v_head_dim=value_width,
        rope_theta=gguf.number(key + "rope.freq_base", 10000.0),
        rope_scaling=read_scaling(gguf, context),
        first_k_dense_replace=gguf.integer(key + "leading_dense_block_count", 0),
        n_shared_experts=gguf.integer(key + "expert_shared_count", 0),
        router=_read_router(gguf, experts, layers) if experts else None,
    )
    _check(gguf, config)
    return config


def geometry(config: Config) -> Geometry:
    """The sizes that plans and `inspect` need."""
    router = config.router
    return Geometry(
        architecture="deepseek2",
        layers=config.num_layers,
        dense_layers=config.first_k_dense_replace if router else config.num_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        context_length=config.max_position_embeddings,
        heads=config.num_attention_heads,
        experts=router.n_experts if router else 0,
        experts_used=router.top_k if router else 0,
        experts_shared=config.n_shared_experts,
        cache_width=config.kv_lora_rank + config.qk_rope_head_dim,
        expanded_width=config.num_attention_heads
        * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim),
    )


def build(gguf: GGUFFile, ops: Ops[X]) -> Decoder[X]:
    """Prepare the model in `gguf` on a device. Raises `GGUFError` for what does not fit."""
    config = read_config(gguf)
    weights = Weights(gguf)
    shape = _attention_shape(config)
    layers = [
        Layer(
            attention=ops.mla(_attention_weights(weights.block(i)), shape),
            feed_forward=_feed_forward(weights.block(i), i, config, ops),
        )
        for i in range(config.num_layers)
    ]
    return assemble(geometry(config), weights, layers, ops, config.rms_norm_eps)


def _attention_shape(config: Config) -> MlaShape:
    return MlaShape(
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope_width=config.qk_rope_head_dim,
        value=config.v_head_dim,
        kv_rank=config.kv_lora_rank,
        softmax_scale=softmax_scale(
            config.qk_nope_head_dim + config.qk_rope_head_dim, config.rope_scaling
        ),
        eps=config.rms_norm_eps,
        latent_eps=LATENT_EPS,
        rope=make_rope(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling),
    )


def _attention_weights(block: Weights) -> MlaWeights:
    ranked = block.find("attn_q_a") is not None
    legacy = block.find("attn_k_b") is None and block.find("attn_kv_b") is not None
    return MlaWeights(
        norm=block["attn_norm"],
        q=None if ranked else block["attn_q"],
        q_a=block["attn_q_a"] if ranked else None,
        q_a_norm=block["attn_q_a_norm"] if ranked else None,
        q_b=block["attn_q_b"] if ranked else None,
        kv_a=block["attn_kv_a_mqa"],
        kv_a_norm=block["attn_kv_a_norm"],
        k_b=None if legacy else block["attn_k_b"],
        v_b=None if legacy else block["attn_v_b"],
        kv_b=block["attn_kv_b"] if legacy else None,
        output=block["attn_output"],
    )


def _feed_forward(block: Weights, index: int, config: Config, ops: Ops[X]) -> FeedForward[X]:
    if config.router is None or index < config.first_k_dense_replace:
        dense = FfnWeights(block["ffn_norm"], block["ffn_gate"], block["ffn_up"], block["ffn_down"])
        return ops.ffn(dense, config.rms_norm_eps)
    fused = block.find("ffn_gate_up_exps")
    shared = config.n_shared_experts > 0
    experts = MoeWeights(
        norm=block["ffn_norm"],
        router=block["ffn_gate_inp"],
        router_bias=block.find("exp_probs_b.bias"),
        gate=None if fused else block["ffn_gate_exps"],
        up=None if fused else block["ffn_up_exps"],
        gate_up=fused,
        down=block["ffn_down_exps"],
        shared_gate=block["ffn_gate_shexp"] if shared else None,
        shared_up=block["ffn_up_shexp"] if shared else None,
        shared_down=block["ffn_down_shexp"] if shared else None,
    )
    return ops.moe(experts, config.router, config.rms_norm_eps)


def _read_router(gguf: GGUFFile, experts: int, layers: int) -> Router:
    key = "deepseek2."
    gating = gguf.integer(key + "expert_gating_func", _default_gating(gguf, layers))
    if gating not in GATING:
        raise GGUFError(
            f"{gguf.path}: {key}expert_gating_func is {gating}; localds computes "
            + ", ".join(f"{number} ({name})" for number, name in GATING.items())
        )
    biased = any(name.endswith("exp_probs_b.bias") for name in gguf.tensors)
    used = gguf.integers(key + "expert_used_count")
    if len(set(used)) != 1:
        raise GGUFError(
            f"{gguf.path}: {key}expert_used_count differs between layers ({used}), "
            "which localds cannot compute"
        )
    return Router(
        n_experts=experts,
        top_k=used[0],
        gating=GATING[gating],
        normalize=gguf.flag(key + "expert_weights_norm", default=False),
        # A stored 0 means that no scale was given.
        scale=gguf.number(key + "expert_weights_scale", 1.0) or 1.0,
        groups=gguf.integer(key + "expert_group_count", 1),
        groups_used=gguf.integer(key + "expert_group_used_count", 1),
        # V2 routes by softmax and scores a group by its best expert; V3, with sigmoid and a bias,
        # by the sum of its best two.
        group_score=(
            GroupScore.MAX
            if GATING[gating] is Gating.SOFTMAX and not biased
            else GroupScore.TOP2_SUM
        ),
    )


def _default_gating(gguf: GGUFFile, layers: int) -> int:
    """Files without the key are softmax models, but for early GLM-4.7-Flash ones."""
    return 2 if layers in (47, 48) and _vocab_size(gguf) == 154880 else 1


def _vocab_size(gguf: GGUFFile) -> int:
    return Weights(gguf)["token_embd"].shape[-1]


def _check(gguf: GGUFFile, config: Config) -> None:
    """Reject figures that no tensor shape would catch later."""
    positive = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "attention.key_length_mla (less rope.dimension_count)": config.qk_nope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
    }
    for name, value in positive.items():
        if value < 1:
            raise GGUFError(f"{gguf.path}: deepseek2.{name} is {value}; it must be at least 1")
    if config.qk_rope_head_dim % 2:
        raise GGUFError(
            f"{gguf.path}: deepseek2.rope.dimension_count is {config.qk_rope_head_dim}; "
            "rotary embedding needs an even width"
        )
    router = config.router
    if router and router.groups > 1:
        if router.n_experts % router.groups or not 0 < router.groups_used <= router.groups:
            raise GGUFError(
                f"{gguf.path}: {router.n_experts} experts in {router.groups} groups, "
                f"{router.groups_used} used: experts must divide evenly into groups and at least "
                "one group be used"
            )
        if router.top_k > router.n_experts // router.groups * router.groups_used:
            raise GGUFError(
                f"{gguf.path}: {router.top_k} experts cannot be chosen from "
                f"{router.groups_used} groups of {router.n_experts // router.groups}"
            )

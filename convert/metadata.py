"""config.json to GGUF metadata, for the architectures `deepseek2` and `llama` (Mixtral)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convert.config import CheckpointError

if TYPE_CHECKING:
    from convert.config import Config
    from convert.source import Value

ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
    "Glm4MoeLiteForCausalLM": "deepseek2",
    "YoutuForCausalLM": "deepseek2",
    "KimiK25ForConditionalGeneration": "deepseek2",
    "MixtralForCausalLM": "llama",
}
"""Model classes of checkpoints, and the GGUF architecture of each."""

GATING_FUNCTIONS = {"softmax": 1, "sigmoid": 2}


def model_class(config: Config) -> str:
    """The checkpoint's model class. Raises `CheckpointError` if it is not in `ARCHITECTURES`."""
    names = config.strings("architectures")
    for name in names:
        if name in ARCHITECTURES:
            return name
    raise CheckpointError(
        f"config.json: architectures is {names}; convert knows {', '.join(ARCHITECTURES)}"
    )


def architecture_metadata(config: Config, *, mtp: bool = False) -> dict[str, Value]:
    """The `deepseek2.*` or `llama.*` keys, with `mtp` for a file that has its MTP layers.

    Raises `CheckpointError` for a value that is missing, or that GGUF has no way to express.
    """
    name = model_class(config)
    activation = config.text("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act is {activation!r}; convert knows silu")
    keys = _mixtral(config) if name == "MixtralForCausalLM" else _deepseek2(config, name)
    if mtp:
        keys |= _extra_layers(config)
    prefix = ARCHITECTURES[name]
    return {f"{prefix}.{key}": value for key, value in keys.items()}


def leading_dense_layers(config: Config) -> int:
    """How many of the first layers have a dense feed-forward network instead of experts."""
    if "mlp_layer_types" in config:
        kinds = config.strings("mlp_layer_types")
        dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
        if kinds[dense:] != ["sparse"] * (len(kinds) - dense):
            raise CheckpointError(
                f"config.json: mlp_layer_types is {kinds}; dense layers after sparse ones "
                "cannot be expressed in GGUF"
            )
        return dense
    if "n_routed_experts" not in config:
        return config.integer("num_hidden_layers")
    if config.integer("moe_layer_freq", 1) != 1:
        raise CheckpointError(
            f"config.json: moe_layer_freq is {config.integer('moe_layer_freq')}; "
            "only 1 can be expressed in GGUF"
        )
    return min(config.integer("first_k_dense_replace", 0), config.integer("num_hidden_layers"))


def _common(config: Config) -> dict[str, Value]:
    return {
        "block_count": config.integer("num_hidden_layers"),
        "context_length": config.integer("max_position_embeddings"),
        "embedding_length": config.integer("hidden_size"),
        "feed_forward_length": config.integer("intermediate_size"),
        "attention.head_count": config.integer("num_attention_heads"),
        "vocab_size": config.integer("vocab_size"),
    }


def _extra_layers(config: Config) -> dict[str, Value]:
    """Multi-token-prediction layers count as blocks."""
    extra = config.integer("num_nextn_predict_layers", 0)
    if not extra:
        raise CheckpointError("config.json names no num_nextn_predict_layers; leave out --mtp")
    return {
        "block_count": config.integer("num_hidden_layers") + extra,
        "nextn_predict_layers": extra,
    }


def _deepseek2(config: Config, name: str) -> dict[str, Value]:
    if not config.flag("rope_interleave", default=True):
        raise CheckpointError("config.json: rope_interleave is false; convert knows only true")
    keys = _common(config) | _latent_attention(config) | _feed_forward(config, name)
    keys["attention.layer_norm_rms_epsilon"] = config.number("rms_norm_eps", 1e-6)
    keys["leading_dense_block_count"] = leading_dense_layers(config)
    keys["rope.dimension_count"] = config.integer("qk_rope_head_dim")
    return keys | _rope(config, default_theta=10000.0)


def _latent_attention(config: Config) -> dict[str, Value]:
    """Absorbed attention is multi-query: a token's one key is its latent, then the rope part."""
    rank = config.integer("kv_lora_rank")
    rope = config.integer("qk_rope_head_dim")
    keys: dict[str, Value] = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config.integer("qk_nope_head_dim") + rope,
        "attention.value_length_mla": config.integer("v_head_dim"),
    }
    if "q_lora_rank" in config:
        keys["attention.q_lora_rank"] = config.integer("q_lora_rank")
    return keys


def _feed_forward(config: Config, name: str) -> dict[str, Value]:
    """Expert keys, which a model without experts also has to have."""
    width = config.integer("moe_intermediate_size", config.integer("intermediate_size"))
    keys: dict[str, Value] = {
        "expert_shared_count": config.integer("n_shared_experts", 0),
        "expert_feed_forward_length": width,
    }
    return keys | _experts(config, name) if "n_routed_experts" in config else keys


def _experts(config: Config, name: str) -> dict[str, Value]:
    # V2 normalizes and scales nothing unless told so; the classes after it both, by default.
    second = name == "DeepseekV2ForCausalLM"
    gating = config.text("scoring_func", "softmax" if second else "sigmoid")
    if gating not in GATING_FUNCTIONS:
        raise CheckpointError(
            f"config.json: scoring_func is {gating!r}; convert knows {', '.join(GATING_FUNCTIONS)}"
        )
    keys: dict[str, Value] = {
        "expert_count": config.integer("n_routed_experts"),
        "expert_used_count": config.integer("num_experts_per_tok"),
        "expert_weights_scale": config.number("routed_scaling_factor", 1.0 if second else None),
        "expert_gating_func": GATING_FUNCTIONS[gating],
    }
    groups = config.integer("n_group", 1)
    # DeepSeek-V2 routes within groups only where the config says so, whatever n_group is.
    if "n_group" in config and (groups == 1 or config.text("topk_method", "") != "greedy"):
        keys["expert_group_count"] = groups
        keys["expert_group_used_count"] = config.integer("topk_group")
    if config.flag("norm_topk_prob", default=False if second else None):
        keys["expert_weights_norm"] = True
    return keys


def _mixtral(config: Config) -> dict[str, Value]:
    if "sliding_window" in config:
        raise CheckpointError(
            f"config.json: sliding_window is {config.integer('sliding_window')}; "
            "a window cannot be expressed in GGUF for this architecture"
        )
    heads = config.integer("num_attention_heads")
    width = config.integer("head_dim", config.integer("hidden_size") // heads)
    keys = _common(config)
    keys["attention.layer_norm_rms_epsilon"] = config.number("rms_norm_eps", 1e-5)
    keys["attention.head_count_kv"] = config.integer("num_key_value_heads", heads)
    if "head_dim" in config:
        keys["attention.key_length"] = keys["attention.value_length"] = width
    keys["expert_count"] = config.integer("num_local_experts")
    keys["expert_used_count"] = config.integer("num_experts_per_tok")
    keys["rope.dimension_count"] = width
    return keys | _rope(config, default_theta=1000000.0)


def _rope(config: Config, default_theta: float) -> dict[str, Value]:
    """Hub configs hold `rope_theta` and `rope_scaling`; newer ones both in `rope_parameters`."""
    section = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    scaling = config.section(section)
    theta = scaling.number("rope_theta", config.number("rope_theta", default_theta))
    keys: dict[str, Value] = {"rope.freq_base": theta}
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return keys
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"config.json: {section} has type {kind!r}; convert knows default, linear and yarn"
        )
    keys["rope.scaling.type"] = kind
    keys["rope.scaling.factor"] = scaling.number("factor")
    return keys | _yarn(scaling) if kind == "yarn" else keys


def _yarn(scaling: Config) -> dict[str, Value]:
    """YaRN's keys. GGUF stores 0.1 * mscale_all_dim and has no place for a differing mscale."""
    mscale, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    if "attention_factor" in scaling:
        raise CheckpointError(
            "config.json: YaRN's attention_factor cannot be expressed in GGUF; "
            "convert computes it from factor and mscale_all_dim"
        )
    if all_dim and mscale != all_dim:
        raise CheckpointError(
            f"config.json: YaRN's mscale is {mscale} and mscale_all_dim {all_dim}; "
            "only equal values can be expressed in GGUF"
        )
    keys: dict[str, Value] = {
        "rope.scaling.original_context_length": scaling.integer("original_max_position_embeddings"),
    }
    for beta in ("beta_fast", "beta_slow"):
        if beta in scaling:
            keys[f"rope.scaling.yarn_{beta}"] = scaling.number(beta)
    if all_dim:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * all_dim
    return keys

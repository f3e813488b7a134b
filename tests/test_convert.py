"""The converter: reading checkpoints, metadata, tensor layouts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from checkpoints import (
    SPECIALS,
    VARIANTS,
    VOCABULARY,
    byte_alphabet,
    golden_shapes,
    make_weights,
    read_weight,
    write_variant,
)
from safetensors.numpy import save_file

from convert import Checkpoint, CheckpointError, convert_checkpoint
from convert.checkpoint import Config
from convert.metadata import architecture_metadata, leading_dense_layers
from convert.planner import interleave
from convert.tensors import plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values of the published config.json files, as far as the converter looks at them.
PUBLISHED_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
PUBLISHED_V2_LITE = {
    **PUBLISHED_V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "rope_scaling": {**PUBLISHED_V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
}
PUBLISHED_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32000,
}


def rewrite_weights(folder: Path, edit: dict[str, NDArray[np.float32] | None]) -> None:
    """Replace, add, or (with None) remove tensors of a single-file checkpoint."""
    checkpoint = Checkpoint(folder)
    tensors = {name: read_weight(checkpoint, name) for name in checkpoint.tensors} | edit
    present = {name: data for name, data in tensors.items() if data is not None}
    save_file(present, folder / "model.safetensors")


# Metadata


def test_deepseek_v3_metadata() -> None:
    assert architecture_metadata(Config(PUBLISHED_V3)) == {
        "deepseek2.block_count": 61,
        "deepseek2.context_length": 163840,
        "deepseek2.embedding_length": 7168,
        "deepseek2.feed_forward_length": 18432,
        "deepseek2.attention.head_count": 128,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
        "deepseek2.attention.q_lora_rank": 1536,
        "deepseek2.attention.kv_lora_rank": 512,
        "deepseek2.attention.key_length": 576,
        "deepseek2.attention.value_length": 512,
        "deepseek2.attention.key_length_mla": 192,
        "deepseek2.attention.value_length_mla": 128,
        "deepseek2.vocab_size": 129280,
        "deepseek2.leading_dense_block_count": 3,
        "deepseek2.expert_count": 256,
        "deepseek2.expert_used_count": 8,
        "deepseek2.expert_shared_count": 1,
        "deepseek2.expert_feed_forward_length": 2048,
        "deepseek2.expert_weights_scale": 2.5,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_group_count": 8,
        "deepseek2.expert_group_used_count": 4,
        "deepseek2.rope.dimension_count": 64,
        "deepseek2.rope.freq_base": 10000.0,
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.factor": 40.0,
        "deepseek2.rope.scaling.original_context_length": 4096,
        "deepseek2.rope.scaling.yarn_log_multiplier": 0.1,
        "deepseek2.rope.scaling.yarn_beta_fast": 32.0,
        "deepseek2.rope.scaling.yarn_beta_slow": 1.0,
    }


def test_deepseek_v2_lite_metadata() -> None:
    keys = architecture_metadata(Config(PUBLISHED_V2_LITE))
    assert keys["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert keys["deepseek2.expert_gating_func"] == 1
    assert keys["deepseek2.expert_group_count"] == 1
    for absent in ("attention.q_lora_rank", "expert_weights_norm"):
        assert f"deepseek2.{absent}" not in keys
    # Greedy routing ignores groups, but a file that names them would be routed within them.
    grouped = architecture_metadata(Config(PUBLISHED_V2_LITE | {"n_group": 8}))
    assert "deepseek2.expert_group_count" not in grouped


def test_mixtral_metadata() -> None:
    assert architecture_metadata(Config(PUBLISHED_MIXTRAL)) == {
        "llama.block_count": 32,
        "llama.context_length": 32768,
        "llama.embedding_length": 4096,
        "llama.feed_forward_length": 14336,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 32000,
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
        "llama.rope.dimension_count": 128,
        "llama.rope.freq_base": 1000000.0,
    }


def test_head_width_of_its_own() -> None:
    keys = architecture_metadata(Config(PUBLISHED_MIXTRAL | {"head_dim": 96}))
    assert keys["llama.rope.dimension_count"] == 96
    assert keys["llama.attention.key_length"] == keys["llama.attention.value_length"] == 96


def test_old_and_new_rope_forms_agree() -> None:
    scaling = {**PUBLISHED_V3["rope_scaling"], "rope_theta": 10000.0, "rope_type": "yarn"}
    scaling.pop("type")
    new = {**PUBLISHED_V3, "rope_parameters": scaling, "rope_theta": None, "rope_scaling": None}
    assert architecture_metadata(Config(new)) == architecture_metadata(Config(PUBLISHED_V3))


def test_layer_kinds() -> None:
    kinds = ["dense", "dense", "sparse"]
    assert leading_dense_layers(Config({"mlp_layer_types": kinds})) == 2
    with pytest.raises(CheckpointError, match="dense layers after sparse ones"):
        leading_dense_layers(Config({"mlp_layer_types": kinds[::-1]}))


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (PUBLISHED_V3, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*convert knows"),
        (PUBLISHED_V3, {"hidden_size": None}, "hidden_size is missing"),
        (PUBLISHED_V3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (PUBLISHED_V3, {"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        (PUBLISHED_V3, {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        (PUBLISHED_V3, {"rope_interleave": False}, "rope_interleave"),
        (PUBLISHED_V3, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "type 'dynamic'"),
        (PUBLISHED_V3, {"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is missing"),
        (
            PUBLISHED_V3,
            {"rope_scaling": PUBLISHED_V3["rope_scaling"] | {"mscale": 0.5}},
            "mscale is 0.5 and mscale_all_dim 1.0",
        ),
        (
            PUBLISHED_V3,
            {"rope_scaling": PUBLISHED_V3["rope_scaling"] | {"attention_factor": 1.2}},
            "attention_factor",
        ),
        (PUBLISHED_MIXTRAL, {"sliding_window": 4096}, "sliding_window is 4096"),
    ],
)
def test_config_that_gguf_cannot_express(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        architecture_metadata(Config(base | change))


# Layouts


def numbered(*shape: int) -> NDArray[np.float32]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_key_and_value_halves(tmp_path: Path) -> None:
    heads, nope, value, rank = 4, 32, 24, 48
    kv_b = numbered(heads * (nope + value), rank)
    folder = write_variant("v2-lite", tmp_path)
    rewrite_weights(folder, {"model.layers.1.self_attn.kv_b_proj.weight": kv_b})
    targets = {target.name: target for target in plan(Checkpoint(folder))}
    keys, values = targets["blk.1.attn_k_b.weight"], targets["blk.1.attn_v_b.weight"]
    assert keys.shape == (heads, rank, nope)
    assert values.shape == (heads, value, rank)
    for head in range(heads):
        rows = kv_b[head * (nope + value) : (head + 1) * (nope + value)]
        np.testing.assert_array_equal(keys.read(head, 3, 20), rows[:nope].T[3:20])
        np.testing.assert_array_equal(values.read(head, 5, 24), rows[nope:][5:24])


def test_interleave() -> None:
    heads, width, columns = 2, 6, 3
    old = numbered(heads * width, columns)
    new = interleave(old, heads)
    for head in range(heads):
        for pair in range(width // 2):
            first = head * width + pair
            row = head * width + 2 * pair
            np.testing.assert_array_equal(new[row], old[first])
            np.testing.assert_array_equal(new[row + 1], old[first + width // 2])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_deepseek_tensors(tmp_path: Path) -> None:
    weights = make_weights(golden_shapes("v3"), VARIANTS["v3"].seed)
    convert_checkpoint(write_variant("v3", tmp_path / "v3"), tmp_path / "v3.gguf", pre="gpt-2")
    fields, tensors = read_gguf(tmp_path / "v3.gguf")

    def equal(name: str, source: str) -> None:
        np.testing.assert_array_equal(tensors.pop(name), weights[f"model.{source}"])

    np.testing.assert_array_equal(tensors.pop("output.weight"), weights["lm_head.weight"])
    equal("token_embd.weight", "embed_tokens.weight")
    equal("output_norm.weight", "norm.weight")
    for layer in range(3):
        hf, blk = f"layers.{layer}.", f"blk.{layer}."
        equal(blk + "attn_norm.weight", hf + "input_layernorm.weight")
        equal(blk + "attn_q_a.weight", hf + "self_attn.q_a_proj.weight")
        equal(blk + "attn_q_a_norm.weight", hf + "self_attn.q_a_layernorm.weight")
        equal(blk + "attn_q_b.weight", hf + "self_attn.q_b_proj.weight")
        equal(blk + "attn_kv_a_mqa.weight", hf + "self_attn.kv_a_proj_with_mqa.weight")
        equal(blk + "attn_kv_a_norm.weight", hf + "self_attn.kv_a_layernorm.weight")
        equal(blk + "attn_output.weight", hf + "self_attn.o_proj.weight")
        equal(blk + "ffn_norm.weight", hf + "post_attention_layernorm.weight")
        assert tensors.pop(blk + "attn_k_b.weight").shape == (4, 48, 32)
        assert tensors.pop(blk + "attn_v_b.weight").shape == (4, 24, 48)
        for kind in ("gate", "up", "down"):
            if layer == 0:
                equal(f"{blk}ffn_{kind}.weight", f"{hf}mlp.{kind}_proj.weight")
                continue
            equal(f"{blk}ffn_{kind}_shexp.weight", f"{hf}mlp.shared_experts.{kind}_proj.weight")
            experts = tensors.pop(f"{blk}ffn_{kind}_exps.weight")
            assert len(experts) == 8
            for index, expert in enumerate(experts):
                source = f"model.{hf}mlp.experts.{index}.{kind}_proj.weight"
                np.testing.assert_array_equal(expert, weights[source])
        if layer:
            equal(blk + "ffn_gate_inp.weight", hf + "mlp.gate.weight")
            equal(blk + "exp_probs_b.bias", hf + "mlp.gate.e_score_correction_bias")
    assert not tensors
    assert fields["general.architecture"] == "deepseek2"
    assert fields["general.type"] == "model"
    assert fields["general.name"] == "v3"
    assert fields["general.file_type"] == 0
    assert fields["general.quantization_version"] == 2


def test_mixtral_tensors(tmp_path: Path) -> None:
    weights = make_weights(golden_shapes("mixtral"), VARIANTS["mixtral"].seed)
    convert_checkpoint(write_variant("mixtral", tmp_path / "m"), tmp_path / "m.gguf", pre="gpt-2")
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "llama"
    assert len(tensors) == 3 + 3 * 10
    attention = "model.layers.1.self_attn."
    for kind, heads in (("q", 4), ("k", 2)):
        expected = interleave(weights[f"{attention}{kind}_proj.weight"], heads)
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{kind}.weight"], expected)
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        name = f"model.layers.2.block_sparse_moe.experts.4.{theirs}.weight"
        np.testing.assert_array_equal(tensors[f"blk.2.ffn_{ours}_exps.weight"][4], weights[name])


def test_value_types_of_keys(tmp_path: Path) -> None:
    """Readers refuse scalars of another type than the one they expect."""
    convert_checkpoint(write_variant("v3", tmp_path / "v3"), tmp_path / "v3.gguf", pre="gpt-2")
    fields = gguf.GGUFReader(tmp_path / "v3.gguf").fields
    types = gguf.GGUFValueType
    for key, kind in {
        "deepseek2.block_count": types.UINT32,
        "deepseek2.rope.freq_base": types.FLOAT32,
        "deepseek2.expert_weights_norm": types.BOOL,
        "deepseek2.rope.scaling.type": types.STRING,
        "tokenizer.ggml.bos_token_id": types.UINT32,
    }.items():
        assert fields[key].types == [kind], key


def test_tied_embeddings_have_no_output(tmp_path: Path) -> None:
    folder = write_variant("v2-tied", tmp_path)
    weights = make_weights(golden_shapes("v2-tied"), 1)
    rewrite_weights(folder, {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert "output.weight" not in {target.name for target in plan(Checkpoint(folder))}


# What it refuses


def test_missing_tensor(tmp_path: Path) -> None:
    folder = write_variant("v2-lite", tmp_path)
    missing = "model.layers.2.mlp.experts.5.up_proj.weight"
    rewrite_weights(folder, {missing: None})
    with pytest.raises(CheckpointError, match=rf"no tensor '{missing}'"):
        convert_checkpoint(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert not (tmp_path / "out.gguf").exists()


def test_leftover_tensors(tmp_path: Path) -> None:
    folder = write_variant("v2-lite", tmp_path)
    bias = {f"model.layers.{i}.self_attn.o_proj.bias": np.ones(64, np.float32) for i in range(3)}
    rewrite_weights(folder, bias)
    with pytest.raises(
        CheckpointError, match=r"does not know .*layers\.0\.self_attn\.o_proj\.bias"
    ):
        convert_checkpoint(folder, tmp_path / "out.gguf", pre="gpt-2")
    rewrite_weights(folder, {f"extra.{i}": np.ones(1, np.float32) for i in range(9)})
    with pytest.raises(CheckpointError, match="and 7 more"):
        convert_checkpoint(folder, tmp_path / "out.gguf", pre="gpt-2")


def test_extra_layers_and_stored_frequencies_are_left_out(tmp_path: Path) -> None:
    folder = write_variant("v2-lite", tmp_path)
    before = plan(Checkpoint(folder))
    ignored = {
        "model.layers.3.eh_proj.weight": np.ones((4, 8), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    rewrite_weights(folder, ignored)
    after = plan(Checkpoint(folder))
    assert [target.name for target in after] == [target.name for target in before]


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("v2-lite", "model.layers.1.self_attn.kv_b_proj.weight", (200, 48)),
        ("v2-lite", "model.layers.1.mlp.experts.3.gate_proj.weight", (40, 63)),
        ("mixtral-wide", "model.layers.0.self_attn.k_proj.weight", (23, 64)),
    ],
)
def test_shape_that_does_not_fit(
    tmp_path: Path, name: str, tensor: str, shape: tuple[int, int]
) -> None:
    folder = write_variant(name, tmp_path)
    rewrite_weights(folder, {tensor: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=rf"'{tensor}' has shape \({shape[0]}, {shape[1]}\)"):
        plan(Checkpoint(folder))


def test_config_without_heads(tmp_path: Path) -> None:
    folder = write_variant("mixtral", tmp_path, num_attention_heads=0)
    with pytest.raises(CheckpointError, match=r"q_proj.weight' has shape \(64, 64\), but"):
        plan(Checkpoint(folder))


# Vocabulary


def test_vocabulary(tmp_path: Path) -> None:
    folder = write_variant("v2-lite", tmp_path / "v2")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    convert_checkpoint(folder, tmp_path / "out.gguf", pre="deepseek-llm")
    fields, _ = read_gguf(tmp_path / "out.gguf")
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "deepseek-llm"
    assert tokens[:3] == SPECIALS
    assert tokens[3:259] == byte_alphabet()
    assert len(set(tokens)) == VOCABULARY
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert fields["tokenizer.ggml.token_type"] == [3] * 3 + [1] * 263 + [5] * (VOCABULARY - 266)
    assert fields["tokenizer.ggml.merges"][:3] == ["t h", "th e", "Ġ the"]
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = write_variant("v2-lite", tmp_path / "v2")
    (folder / "chat_template.jinja").write_text("{{ 'ä' }}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}")
    convert_checkpoint(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert read_gguf(tmp_path / "out.gguf")[0]["tokenizer.chat_template"] == "{{ 'ä' }}"


def test_failure_while_writing_leaves_no_file(tmp_path: Path) -> None:
    folder = write_variant("v2-lite", tmp_path / "v2")
    scales = {"model.norm.weight": np.ones(64, np.int32)}
    rewrite_weights(folder, scales)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="dtype I32"):
        convert_checkpoint(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert [path.name for path in tmp_path.iterdir()] == ["v2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokenizer\.json: no such file"),
        ("{}", "not a BPE tokenizer"),
        ("[", r"tokenizer\.json: not valid JSON"),
        ('{"model": {"vocab": {}, "merges": [], "byte_fallback": true}}', "SentencePiece"),
        ('{"model": {"vocab": {"a": 400}, "merges": []}}', "token id 400 is beyond vocab_size"),
    ],
)
def test_vocabulary_that_does_not_fit(tmp_path: Path, content: str | None, message: str) -> None:
    folder = write_variant("v2-lite", tmp_path)
    if content is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(folder, tmp_path / "out.gguf", pre="gpt-2")

"""Checkpoint tensors to GGUF tensors: names, and the few that change their layout.

A plan is made from names and shapes alone; data is read one expert at a time when it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convert.checkpoint import CheckpointError
from convert.metadata import leading_dense_layers, model_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from convert.checkpoint import Checkpoint

    Transform = Callable[[NDArray[np.float32]], NDArray[np.float32]]

# Frequencies that old checkpoints store although they follow from the config.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class Target:
    """One GGUF tensor. `shape` is in numpy order, slowest first: GGUF's reversed.

    The parts of `sources`, each read and transformed, follow one another along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transform: Transform

    def parts(self, checkpoint: Checkpoint) -> Iterator[NDArray[np.float32]]:
        """The data in order, one source at a time."""
        for source in self.sources:
            yield np.ascontiguousarray(self.transform(checkpoint.read(source)))


def plan(checkpoint: Checkpoint) -> list[Target]:
    """All GGUF tensors of a checkpoint, in the order of the layers.

    Multi-token-prediction layers (beyond num_hidden_layers) are left out. Raises `CheckpointError`
    for a missing tensor, a shape that does not fit, or tensors that no GGUF tensor takes.
    """
    config = checkpoint.config
    planner = _Planner(checkpoint)
    planner.copy("model.embed_tokens.weight", "token_embd.weight")
    mixtral = model_class(config) == "MixtralForCausalLM"
    for layer in range(config.integer("num_hidden_layers")):
        if mixtral:
            _mixtral_layer(planner, layer)
        else:
            _deepseek2_layer(planner, layer)
    planner.copy("model.norm.weight", "output_norm.weight")
    if config.flag("tie_word_embeddings", default=False):
        planner.used.add("lm_head.weight")
    else:
        planner.copy("lm_head.weight", "output.weight")
    planner.check_leftovers()
    return planner.targets


def key_half(kv_b: NDArray[np.float32], heads: int, nope: int) -> NDArray[np.float32]:
    """The keys' part of kv_b_proj, so that it maps a query head into the latent space.

    [heads * (nope + value), rank] to [heads, rank, nope].
    """
    split = kv_b.reshape(heads, -1, kv_b.shape[-1])
    return split[:, :nope].transpose(0, 2, 1)


def value_half(kv_b: NDArray[np.float32], heads: int, nope: int) -> NDArray[np.float32]:
    """The values' part of kv_b_proj: [heads * (nope + value), rank] to [heads, value, rank]."""
    return kv_b.reshape(heads, -1, kv_b.shape[-1])[:, nope:]


def interleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder each head's rows so that the pair (j, j + d/2) of rotary embedding is adjacent.

    [heads * d, columns]; new row 2j is old row j, new row 2j + 1 is old row j + d/2.
    """
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _deepseek2_layer(planner: _Planner, layer: int) -> None:
    config = planner.checkpoint.config
    hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
    planner.copy(hf + "input_layernorm.weight", gguf + "attn_norm.weight")
    attention = hf + "self_attn."
    if "q_lora_rank" in config:
        planner.copy(attention + "q_a_proj.weight", gguf + "attn_q_a.weight")
        planner.copy(attention + "q_a_layernorm.weight", gguf + "attn_q_a_norm.weight")
        planner.copy(attention + "q_b_proj.weight", gguf + "attn_q_b.weight")
    else:
        planner.copy(attention + "q_proj.weight", gguf + "attn_q.weight")
    planner.copy(attention + "kv_a_proj_with_mqa.weight", gguf + "attn_kv_a_mqa.weight")
    planner.copy(attention + "kv_a_layernorm.weight", gguf + "attn_kv_a_norm.weight")
    _split_kv_b(planner, attention + "kv_b_proj.weight", gguf)
    planner.copy(attention + "o_proj.weight", gguf + "attn_output.weight")
    planner.copy(hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight")
    if layer < leading_dense_layers(config):
        _swiglu(planner, hf + "mlp.", gguf, suffix="")
        return
    planner.copy(hf + "mlp.gate.weight", gguf + "ffn_gate_inp.weight")
    bias = hf + "mlp.gate.e_score_correction_bias"
    if bias in planner.checkpoint.tensors:
        planner.copy(bias, gguf + "exp_probs_b.bias")
    for projection in ("gate", "up", "down"):
        planner.stack(
            hf + f"mlp.experts.{{}}.{projection}_proj.weight",
            config.integer("n_routed_experts"),
            gguf + f"ffn_{projection}_exps.weight",
        )
    if config.integer("n_shared_experts", 0):
        _swiglu(planner, hf + "mlp.shared_experts.", gguf, suffix="_shexp")


def _split_kv_b(planner: _Planner, source: str, gguf: str) -> None:
    config = planner.checkpoint.config
    heads, rank = config.integer("num_attention_heads"), config.integer("kv_lora_rank")
    nope, value = config.integer("qk_nope_head_dim"), config.integer("v_head_dim")
    planner.check_shape(source, (heads * (nope + value), rank))
    planner.add(
        gguf + "attn_k_b.weight",
        (heads, rank, nope),
        (source,),
        lambda kv_b: key_half(kv_b, heads, nope),
    )
    planner.add(
        gguf + "attn_v_b.weight",
        (heads, value, rank),
        (source,),
        lambda kv_b: value_half(kv_b, heads, nope),
    )


def _swiglu(planner: _Planner, hf: str, gguf: str, suffix: str) -> None:
    for projection in ("gate", "up", "down"):
        planner.copy(hf + f"{projection}_proj.weight", gguf + f"ffn_{projection}{suffix}.weight")


def _mixtral_layer(planner: _Planner, layer: int) -> None:
    config = planner.checkpoint.config
    hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    planner.copy(hf + "input_layernorm.weight", gguf + "attn_norm.weight")
    for projection, rotated_heads in (("q", heads), ("k", kv_heads)):
        planner.permute(
            hf + f"self_attn.{projection}_proj.weight",
            rotated_heads,
            gguf + f"attn_{projection}.weight",
        )
    planner.copy(hf + "self_attn.v_proj.weight", gguf + "attn_v.weight")
    planner.copy(hf + "self_attn.o_proj.weight", gguf + "attn_output.weight")
    planner.copy(hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight")
    planner.copy(hf + "block_sparse_moe.gate.weight", gguf + "ffn_gate_inp.weight")
    for projection, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        planner.stack(
            hf + f"block_sparse_moe.experts.{{}}.{projection}.weight",
            config.integer("num_local_experts"),
            gguf + f"ffn_{name}_exps.weight",
        )


class _Planner:
    """Collects targets and remembers which checkpoint tensors they take."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.targets: list[Target] = []
        self.used: set[str] = set()

    def add(
        self, name: str, shape: tuple[int, ...], sources: tuple[str, ...], transform: Transform
    ) -> None:
        self.targets.append(Target(name, shape, sources, transform))
        self.used.update(sources)

    def copy(self, source: str, name: str) -> None:
        self.add(name, self.checkpoint.find(source).shape, (source,), lambda data: data)

    def permute(self, source: str, heads: int, name: str) -> None:
        shape = self.checkpoint.find(source).shape
        if len(shape) != 2 or shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensor {source!r} has shape {shape}; "
                f"its rows must be {heads} heads of an even width"
            )
        self.add(name, shape, (source,), lambda rows: interleave(rows, heads))

    def stack(self, pattern: str, count: int, name: str) -> None:
        """One tensor [count, rows, columns] from the tensors of `count` experts."""
        sources = tuple(pattern.format(index) for index in range(count))
        shape = self.checkpoint.find(sources[0]).shape
        for source in sources:
            self.check_shape(source, shape)
        self.add(name, (count, *shape), sources, lambda data: data)

    def check_shape(self, source: str, expected: tuple[int, ...]) -> None:
        shape = self.checkpoint.find(source).shape
        if shape != expected:
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensor {source!r} has shape {shape}; "
                f"config.json and its neighbours ask for {expected}"
            )

    def check_leftovers(self) -> None:
        """Every tensor must have been taken: one that was not means another architecture."""
        layers = self.checkpoint.config.integer("num_hidden_layers")
        left = [
            name
            for name in self.checkpoint.tensors
            if name not in self.used and not DERIVED.search(name) and _layer_of(name) < layers
        ]
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise CheckpointError(
                f"{self.checkpoint.folder}: convert does not know what to do with "
                f"{', '.join(left[:5])}{more}; the model is not what config.json says it is"
            )


def _layer_of(name: str) -> int:
    """The layer number in a tensor's name; -1 outside of the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1

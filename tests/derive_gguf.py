"""Rewrite GGUF files into other forms that are in use: old ones, fused ones, with extra layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Tensors = dict[str, NDArray[np.float32]]


def rewrite(
    source: Path, target: Path, keys: Mapping[str, int | None], edit: Callable[[Tensors], Tensors]
) -> Path:
    """Copy a float32 GGUF file with `keys` set (None: removed) and its tensors edited."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in keys:
            _copy_field(writer, name, field)
    for name, value in keys.items():
        if value is not None:
            writer.add_uint32(name, value)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, data in edit(tensors).items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _copy_field(writer: gguf.GGUFWriter, name: str, field: Any) -> None:
    if field.types[0] == gguf.GGUFValueType.ARRAY:
        writer.add_array(name, field.contents())
    else:
        writer.add_key_value(name, field.contents(), field.types[0])


def legacy_kv_b(
    source: Path,
    target: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, NDArray[np.float32]],
) -> Path:
    """The form from before k_b and v_b were split: attn_kv_b, true widths in the plain keys."""

    def edit(tensors: Tensors) -> Tensors:
        kept = {
            name: data
            for name, data in tensors.items()
            if "attn_k_b" not in name and "attn_v_b" not in name
        }
        for layer in range(config["num_hidden_layers"]):
            kv_b = weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
            kept[f"blk.{layer}.attn_kv_b.weight"] = kv_b
        return kept

    keys = {
        "deepseek2.attention.key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "deepseek2.attention.value_length": config["v_head_dim"],
        "deepseek2.attention.head_count_kv": config["num_attention_heads"],
        "deepseek2.attention.key_length_mla": None,
        "deepseek2.attention.value_length_mla": None,
    }
    return rewrite(source, target, keys, edit)


def fused_gate_up(source: Path, target: Path) -> Path:
    """Experts' gate and up matrices in one tensor, gate first."""

    def edit(tensors: Tensors) -> Tensors:
        fused: Tensors = {}
        for name, data in tensors.items():
            if "ffn_gate_exps" in name:
                up = tensors[name.replace("gate", "up")]
                fused[name.replace("gate", "gate_up")] = np.concatenate([data, up], axis=1)
            elif "ffn_up_exps" not in name:
                fused[name] = data
        return fused

    return rewrite(source, target, {}, edit)


def extra_layer(source: Path, target: Path, layers: int) -> Path:
    """A multi-token-prediction layer after the last one, which plain decoding leaves out."""

    def edit(tensors: Tensors) -> Tensors:
        last = f"blk.{layers - 1}."
        copies = {
            name.replace(last, f"blk.{layers}."): data + 1
            for name, data in tensors.items()
            if name.startswith(last)
        }
        norm = tensors["output_norm.weight"]
        nextn = f"blk.{layers}.nextn."
        copies[nextn + "eh_proj.weight"] = np.ones((norm.size, 2 * norm.size), np.float32)
        copies[nextn + "enorm.weight"] = copies[nextn + "hnorm.weight"] = norm
        return tensors | copies

    keys = {"deepseek2.block_count": layers + 1, "deepseek2.nextn_predict_layers": 1}
    return rewrite(source, target, keys, edit)

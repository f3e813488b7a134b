"""GGUF adapters, as llama.cpp reads them: pairs NAME.weight.lora_a and NAME.weight.lora_b."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from localds import _native
from localds.adapters.adapter import Adapter, AdapterError
from localds.adapters.layout import fuse, unfuse
from localds.adapters.names import FUSED, GATE, UP, split_name, targets_of
from localds.finetune.config import AdapterConfig
from localds.gguf import GGUFError, GGUFFile
from localds.gguf.write import write_gguf
from localds.ops.tensors import COMPUTED

if TYPE_CHECKING:
    from pathlib import Path

    from localds.adapters.adapter import Floats, Pair, Tree
    from localds.adapters.base import Base
    from localds.gguf import Tensor
    from localds.gguf.write import WritableValue

# llama.cpp computes these with plain products, past the adapters.
_INERT = {"deepseek2": ("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b")}
_TENSOR = re.compile(r"(blk\.\d{1,4}\.\w+)\.weight\.lora_([ab])")


def inert_in_llama_cpp(adapter: Adapter, architecture: str) -> list[str]:
    """The adapter's tensors that llama.cpp loads and then ignores; merging is the way there."""
    kinds = _INERT.get(architecture, ())
    return [name for name in adapter.tree if split_name(name)[1] in kinds]


def write_gguf_adapter(path: Path, adapter: Adapter, base: Base) -> None:
    """Write an adapter of `base` in float32; `path` is replaced once the file is complete.

    Raises `AdapterError` for what the format cannot hold, which can be merged instead: DoRA, and
    pairs of attn_kv_b where the model has it in two tensors.
    """
    base.check(adapter.tree, adapter.name)
    if adapter.config.method == "dora":
        raise AdapterError(
            f"{path}: GGUF adapters have no DoRA; merge it: localds convert MODEL --merge ADAPTER"
        )
    split = [
        name
        for name in adapter.tree
        if name.endswith(".attn_kv_b") and base.latent_heads(split_name(name)[0])
    ]
    if split:
        raise AdapterError(
            f"{path}: a GGUF adapter cannot hold {split[0]}, which {base.name} has as attn_k_b and "
            "attn_v_b; merge it: localds convert MODEL --merge ADAPTER, or train without kv_b_proj"
        )
    rank = adapter.config.rank
    tensors: dict[str, Floats] = {}
    for name, pair in _as_in_file(adapter.tree, base).items():
        # The scale there is alpha by the rank of each pair.
        own = pair["a"].shape[-2]
        factor = np.float32(own / rank)
        tensors[f"{name}.weight.lora_a"] = pair["a"]
        tensors[f"{name}.weight.lora_b"] = pair["b"] if own == rank else pair["b"] * factor
    write_gguf(path, _metadata(adapter, base), tensors)


def read_gguf_adapter(path: Path, base: Base) -> Adapter:
    """Read an adapter of `base`. Raises `AdapterError` for what is damaged or does not fit."""
    try:
        with GGUFFile.open(path) as gguf:
            alpha = _check_kind(gguf, base)
            pairs = _read_pairs(gguf, base)
            name = gguf.text("general.name", path.stem)
            source = gguf.text("general.base_model.0.name", None)
            revision = gguf.text("general.base_model.0.version", None)
    except GGUFError as error:
        raise AdapterError(str(error)) from None
    tree, ranks = _as_in_tree(pairs, base)
    base.check(tree, str(path))
    rank = Counter(pair["a"].shape[-2] for pair in tree.values()).most_common(1)[0][0]
    for name, pair in tree.items():
        # The scale is alpha by the rank of each pair, or 1 where no alpha is given.
        pair["b"] *= np.float32(rank / ranks[name] if alpha else 1.0)
    try:
        targets = targets_of(base.architecture, tree)
        config = AdapterConfig(rank, alpha or float(rank), "lora", targets)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    return Adapter(name, config, tree, source, revision)


def _metadata(adapter: Adapter, base: Base) -> dict[str, WritableValue]:
    keys: dict[str, WritableValue] = {
        "general.type": "adapter",
        "general.architecture": base.architecture,
        "general.name": adapter.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.scale * adapter.config.rank),
    }
    if adapter.base_model:
        keys |= {"general.base_model.count": 1, "general.base_model.0.name": adapter.base_model}
        if adapter.revision:
            keys["general.base_model.0.version"] = adapter.revision
    return keys


def _as_in_file(tree: Tree, base: Base) -> Tree:
    """The tree with gate and up in one where the model has them so."""
    found: Tree = {}
    for name, pair in tree.items():
        layer, kind = split_name(name)
        if kind in (GATE, UP) and base.is_fused(layer):
            fused = f"blk.{layer}.{FUSED}"
            if fused not in found:
                gate, up = (tree.get(f"blk.{layer}.{half}") for half in (GATE, UP))
                found[fused] = fuse(gate, up, base.matrices[name].rows)
        else:
            found[name] = pair
    return found


def _as_in_tree(pairs: Tree, base: Base) -> tuple[Tree, dict[str, int]]:
    """The opposite of `_as_in_file`, and the rank that each pair has in the file."""
    tree: Tree = {}
    ranks: dict[str, int] = {}
    for name, pair in pairs.items():
        layer, kind = split_name(name)
        halves: dict[str, Pair | None] = {name: pair}
        if kind == FUSED and base.is_fused(layer):
            names = (f"blk.{layer}.{GATE}", f"blk.{layer}.{UP}")
            halves = dict(zip(names, unfuse(pair), strict=True))
        for half_name, half in halves.items():
            if half is not None:
                tree[half_name] = half
                ranks[half_name] = pair["a"].shape[-2]
    return tree, ranks


def _check_kind(gguf: GGUFFile, base: Base) -> float:
    """Check that a file holds an adapter of such a model; returns alpha, 0 where there is none."""
    kind = gguf.text("general.type", "model")
    if kind != "adapter" or gguf.text("adapter.type", "") != "lora":
        raise AdapterError(
            f"{gguf.path}: general.type is {kind!r} and adapter.type "
            f"{gguf.text('adapter.type', '')!r}; a LoRA adapter has 'adapter' and 'lora'"
        )
    if gguf.architecture != base.architecture:
        raise AdapterError(
            f"{gguf.path}: it adapts models of the architecture {gguf.architecture!r}, and "
            f"{base.name} is {base.architecture!r}; it belongs to another model"
        )
    if gguf.has("adapter.alora.invocation_tokens"):
        raise AdapterError(f"{gguf.path}: it is an activated LoRA, which localds cannot apply")
    alpha = gguf.number("adapter.lora.alpha", 0.0)
    if not math.isfinite(alpha) or alpha < 0:
        raise AdapterError(f"{gguf.path}: adapter.lora.alpha is {alpha}")
    return alpha


def _read_pairs(gguf: GGUFFile, base: Base) -> Tree:
    pairs: Tree = {}
    for name, tensor in gguf.tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{gguf.path}: tensor {name!r} is none of a pair that adapts a layer's matrix "
                "(blk.N.NAME.weight.lora_a and .lora_b), and localds applies no others"
            )
        pairs.setdefault(match[1], {})[match[2]] = _values(gguf, tensor, _is_stack(match[1]))
    for name, pair in pairs.items():
        if set(pair) != {"a", "b"}:
            raise AdapterError(f"{gguf.path}: {name} has only its lora_{''.join(pair)}")
        if pair["a"].shape[-2] != pair["b"].shape[-1]:
            raise AdapterError(
                f"{gguf.path}: {name} has ranks {pair['a'].shape[-2]} in lora_a and "
                f"{pair['b'].shape[-1]} in lora_b"
            )
        fused = base.shapes.get(f"{name}.weight") if name.endswith(FUSED) else None
        if fused and (*pair["b"].shape[:2], pair["a"].shape[-1]) != fused:
            raise AdapterError(
                f"{gguf.path}: {name} is made for another shape than the {fused} of {base.name}; "
                "it belongs to another model"
            )
    return pairs


def _is_stack(name: str) -> bool:
    return name.endswith("_exps")


def _values(gguf: GGUFFile, tensor: Tensor, stack: bool) -> Floats:
    """A tensor in float32, of the 2 or 3 dimensions that its name asks for."""
    shape = tensor.shape[::-1]
    dimensions = 3 if stack else 2
    shape = (1,) * (dimensions - len(shape)) + shape
    if len(shape) != dimensions or tensor.type not in COMPUTED:
        raise AdapterError(
            f"{gguf.path}: tensor {tensor.name!r} is {tensor.type.name} of shape {shape}; pairs "
            f"have {dimensions} dimensions and types such as F32, F16 and Q8_0"
        )
    rows = math.prod(shape[:-1])
    matrix = _native.Matrix(tensor.type, rows, shape[-1], 1, tensor.data)
    return _native.dequantize(matrix).reshape(shape)

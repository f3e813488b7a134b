"""Write tests/golden/ with transformers, in float32. Needs torch and transformers.

usage: python tests/make_golden.py [VARIANT ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from checkpoints import GOLDEN, VARIANTS, make_weights, token_ids, write_checkpoint
from safetensors import safe_open

if TYPE_CHECKING:
    from checkpoints import Variant
    from numpy.typing import NDArray


def describe(variant: Variant) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config.json, and the tensors' names and shapes, that transformers itself saves."""
    config = getattr(transformers, variant.model_class + "Config")(**variant.config)
    model = getattr(transformers, variant.model_class + "ForCausalLM")(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        return json.loads((Path(folder) / "config.json").read_text()), shapes


def reference_logits(folder: Path, model_class: str, ids: list[int]) -> NDArray[np.float32]:
    """Logits [n_tokens, n_vocab] of the checkpoint in `folder`."""
    model, report = getattr(transformers, model_class + "ForCausalLM").from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise RuntimeError(f"{folder}: transformers did not take the checkpoint: {report}")
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0]
    return logits.to(torch.float32).numpy()


def write_golden(name: str, root: Path = GOLDEN) -> None:
    variant = VARIANTS[name]
    config, shapes = describe(variant)
    ids = token_ids(variant.seed, variant.tokens)
    with tempfile.TemporaryDirectory() as folder:
        weights = make_weights(shapes, variant.seed)
        write_checkpoint(Path(folder), config, weights, variant.shards, variant.dtype)
        logits = reference_logits(Path(folder), variant.model_class, ids)
    target = root / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    lines = ",\n".join(f"{json.dumps(key)}: {list(shape)}" for key, shape in shapes.items())
    (target / "tensors.json").write_text(f"{{\n{lines}\n}}\n")
    np.savez_compressed(target / "logits.npz", ids=np.array(ids, np.int32), logits=logits)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    top = probabilities.max(1).mean()
    print(f"{name}: logits std {logits.std():.2f}, mean top probability {top:.2f}")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or VARIANTS:
        write_golden(chosen)

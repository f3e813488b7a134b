"""Write tiny models for `parity`, each with the logits that are expected in an .npz beside it.

The tests' golden models bring the logits of transformers. Of a wider one, whose latents the GPU's
kernels of attention take, in many block types, they are computed on the CPU from float32 of the
same values. Needs the packages of the tests.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gpu_report import Report

import localds

sys.path += [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent)]

from checkpoints import VARIANTS, golden_config, golden_shapes, make_weights, write_checkpoint
from derive_gguf import rewrite
from test_golden import DERIVED, convert_variant, derive, golden

from convert import convert, open_checkpoint

GOLDEN = ("v2-lite", "v3", "mixtral", "v2-dense")
OTHER_FORMS = ("v3, legacy kv_b", "v2-lite, fused gate_up")

RECIPES = ("F16", "Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")
RECIPES += ("IQ4_XS", "MXFP4_MOE")
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 2,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 32,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)


def run(arguments: argparse.Namespace, report: Report) -> None:
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        made = {name: convert_variant(name, work) for name in GOLDEN}
        for name in OTHER_FORMS:
            variant, form = DERIVED[name]
            made[name] = derive(variant, form, made[variant], work / f"{name}.gguf")
        for name, path in made.items():
            target = folder / f"{name.replace(', ', '-').replace(' ', '_')}.gguf"
            ids, logits = golden(DERIVED[name][0] if name in DERIVED else name)
            shutil.copyfile(path, target)
            np.savez(target.with_suffix(".npz"), ids=np.array(ids), logits=logits)
        write_wide(folder, work)
    models = sorted(folder.glob("*.gguf"))
    size = sum(path.stat().st_size for path in folder.iterdir())
    report.say(f"{len(models)} models in {folder}, {size / 1e6:.1f} MB")


def write_wide(folder: Path, work: Path) -> None:
    """The wide model after each recipe."""
    config = golden_config("v2-lite") | WIDE
    shapes = wide_shapes(config)
    checkpoint = write_checkpoint(work / "wide", config, make_weights(shapes, 1))
    source = open_checkpoint(checkpoint, pre=VARIANTS["v2-lite"].pre)
    ids, _ = golden("v2-lite")
    plain = work / "plain.gguf"
    convert(source, plain, recipe="F32")
    for recipe in RECIPES:
        target = folder / f"wide-{recipe}.gguf"
        convert(source, target, recipe=recipe, force=True)
        values = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(target).tensors
        }
        exact = rewrite(plain, work / "exact.gguf", {}, lambda _, of=values: of)
        with localds.load(exact, device="cpu") as model:
            np.savez(target.with_suffix(".npz"), ids=np.array(ids), logits=model.logits(ids))


def wide_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Those of the golden model, with other widths and fewer layers."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    dense, expert = config["intermediate_size"], config["moe_intermediate_size"]
    own = {
        "kv_a_layernorm": (rank,),
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (hidden, heads * value),
        "q_proj": (heads * (nope + rope), hidden),
    }
    shapes = {}
    for name, shape in golden_shapes("v2-lite").items():
        words = name.split(".")
        if words[1] == "layers" and int(words[2]) >= config["num_hidden_layers"]:
            continue
        kind = words[-3] if len(words) > 2 else ""
        widths = {"mlp": dense, "shared_experts": expert * config["n_shared_experts"]}
        width = widths.get(kind, expert)
        sides = {"down_proj": (hidden, width), "gate_proj": (width, hidden)}
        sides["up_proj"] = sides["gate_proj"]
        shapes[name] = (own | sides).get(words[-2], (*shape[:-1], hidden))
    return shapes

"""Write tests/golden/adapters/ with PEFT: folders, and logits of the adapted models.

Needs torch, transformers and peft. usage: python tests/make_adapter_golden.py [NAME ...]
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
import transformers
from adapter_cases import EXPERTS, Case
from checkpoints import GOLDEN, VARIANTS, token_ids, uniform, write_variant

if TYPE_CHECKING:
    from numpy.typing import NDArray

ADAPTERS = GOLDEN / "adapters"
IDS = token_ids(11, 16)
SHARED = [f"mlp.shared_experts.{kind}_proj.weight" for kind in ("gate", "up", "down")]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Golden:
    """A variant, and what is given to `LoraConfig`; `single` experts are modules of their own."""

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    single: bool = False


GOLDENS = {
    # Everything that transformers 5 has in an MoE layer; B of gate and up is a full matrix.
    "v3": Golden(
        "v3",
        {
            "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
            "target_parameters": [*STACKS, *SHARED, "mlp.gate.weight", "mlp.up_proj.weight"],
        },
    ),
    "v2-lite-dora": Golden(
        "v2-lite",
        {
            "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
            "use_dora": True,
        },
    ),
    "mixtral-rslora": Golden(
        "mixtral",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"],
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 4, "k_proj": 1},
            "alpha_pattern": {"k_proj": 9},
            "layers_to_transform": [0, 1],
        },
    ),
    # As PEFT writes them with transformers 4.
    "mixtral-single": Golden("mixtral", {"target_modules": ["w1", "w2", "w3"]}, single=True),
    "v3-single": Golden(
        "v3", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, single=True
    ),
}


def base_model(variant: str, folder: Path) -> Any:
    model_class = VARIANTS[variant].model_class + "ForCausalLM"
    return getattr(transformers, model_class).from_pretrained(
        write_variant(variant, folder), dtype=torch.float32, attn_implementation="eager"
    )


def logits(model: Any, ids: list[int] = IDS) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model.eval()(torch.tensor([ids])).logits[0].numpy()
    return found


def single_experts(variant: str) -> torch.nn.Module:
    """Modules with the names of old checkpoints' experts, and nothing else."""
    root = torch.nn.Module()
    for module, (a, b, _) in Case(variant, modules=EXPERTS).parts.items():
        parent = root
        *path, leaf = module.split(".")
        for name in path:
            if not hasattr(parent, name):
                parent.add_module(name, torch.nn.Module())
            parent = getattr(parent, name)
        parent.add_module(leaf, torch.nn.Linear(a.shape[1], b.shape[0], bias=False))
    return root


def randomize(model: torch.nn.Module) -> None:
    """Give every trained parameter values that follow from its name."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            values = uniform(13, name, tuple(parameter.shape))
            if "magnitude" in name:
                values = values / 2 + 1
            parameter.data = torch.tensor(values / np.float32(3))


def write_golden(name: str, root: Path = ADAPTERS) -> None:
    golden = GOLDENS[name]
    config = peft.LoraConfig(r=2, lora_alpha=5, **golden.options)
    target = root / name
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        base = (
            single_experts(golden.variant)
            if golden.single
            else base_model(golden.variant, Path(folder))
        )
        model = peft.get_peft_model(base, config)
        randomize(model)
        model.save_pretrained(target)
        (target / "README.md").unlink(missing_ok=True)
        fixed_config(target / "adapter_config.json")
        if golden.single:
            tuned = base_model(golden.variant, Path(folder))
            model = peft.PeftModel.from_pretrained(tuned, target)
        np.savez_compressed(
            target / "logits.npz", ids=np.array(IDS, np.int32), logits=logits(model)
        )


def fixed_config(path: Path) -> None:
    """Sort what PEFT writes in a random order, and leave out the folder that the model lay in."""
    values = json.loads(path.read_text())
    values["base_model_name_or_path"] = "localds/tiny"
    for key, value in values.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            values[key] = sorted(value)
    path.write_text(re.sub(r"\r", "", json.dumps(values, indent=1, sort_keys=True)) + "\n")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or GOLDENS:
        write_golden(chosen)
        print(chosen, sum(p.stat().st_size for p in (ADAPTERS / chosen).iterdir()))

"""Write tests/golden/finetune/ with PEFT, in float32. Needs torch, transformers and peft.

usage: python tests/make_finetune_golden.py [PART OF A CASE'S NAME ...]
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import finetune_curves as c
import gguf
import numpy as np
import torch
import transformers
from checkpoints import (
    VARIANTS,
    golden_config,
    golden_shapes,
    write_checkpoint,
)
from make_golden import describe
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file

from convert import convert_checkpoint
from localds.adapters import Adapter, Base, read_peft, write_peft
from localds.adapters.peft_config import CONFIG_FILE
from localds.adapters.peft_read import WEIGHTS_FILE
from localds.gguf import GGUFFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    # The loss of a model's run over a batch, per counted token.
    Loss = Callable[[Any, c.Case, int], torch.Tensor]


# ---- base weights ----


def write_dequantized(name: str, path: Path, folder: Path) -> Path:
    """A checkpoint with the values in the GGUF file at `path` of a base.

    Where each of them belongs tells a file of the same form that holds their places.
    """
    base = c.BASES[name]
    config, shapes = golden_config(base.golden), golden_shapes(base.golden)
    places, total = {}, 0
    for tensor, shape in shapes.items():
        size = int(np.prod(shape))
        places[tensor] = np.arange(total, total + size, dtype=np.float32).reshape(shape)
        total += size
    assert total < 1 << 24
    numbered = write_checkpoint(folder / "numbered", config, places)
    convert_checkpoint(numbered, folder / "numbered.gguf", pre=VARIANTS[base.variant].pre)
    values = np.full(total, np.nan, np.float32)
    there = _tensors(folder / "numbered.gguf")
    for tensor, data in _tensors(path).items():
        values[there[tensor].astype(np.int64).reshape(-1)] = data.reshape(-1)
    assert not np.isnan(values).any()
    weights = {tensor: values[at.astype(np.int64)] for tensor, at in places.items()}
    return write_checkpoint(folder / "dequantized", config, weights)


def _tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """All values of a file but constants, by gguf's own package."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
        if not tensor.name.startswith("rope")
    }


def load_base(name: str, folder: Path) -> Any:
    """The model of transformers in a checkpoint."""
    variant = VARIANTS[c.BASES[name].variant]
    model_class = getattr(transformers, variant.model_class + "ForCausalLM")
    model, report = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise RuntimeError(f"{folder}: transformers did not take the checkpoint: {report}")
    return model


# ---- adapters ----


@contextmanager
def real_names() -> Iterator[None]:
    """PEFT without its names of old checkpoints' experts, which DoRA on dense layers must not get.

    By these, gate_proj is a part of transformers' stack of experts, never a linear module.
    """
    with mock.patch.dict(transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, clear=True):
        yield


def load_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """A folder in PEFT, on a model of transformers. Every tensor must have found its place."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    beyond = config["use_dora"] and any("mlp" in name for name in config["target_modules"])
    with real_names() if beyond else nullcontext():
        loaded = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    taken, given = get_peft_model_state_dict(loaded), load_file(folder / WEIGHTS_FILE)
    assert taken.keys() == given.keys()
    assert all(torch.equal(taken[name], tensor) for name, tensor in given.items())
    return loaded


def hold_blocks(model: Any, rank: int) -> None:
    """Keep B of PEFT's one pair for gate and up block diagonal, as two pairs are."""
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.parameter_name == "gate_up_proj":
            weight = module.lora_B["default"].weight
            rows, experts = weight.shape[0] // 2, module.num_experts
            mask = torch.zeros(2 * rows, 2 * rank, experts)
            mask[:rows, :rank] = mask[rows:, rank:] = 1
            flat = mask.reshape(weight.shape)
            assert not (weight * (1 - flat)).any()
            weight.register_hook(lambda gradient, flat=flat: gradient * flat)


# ---- near ties ----

CLOSE = 5e-6
"""Scores of experts this close to each other may be ordered otherwise by other arithmetic."""
ROUNDING = 1e-5
"""What a learning rate may be off: float32 has 1 - 0.999, by which Adam divides, no better."""
STEADY = 1e-4
"""A run has no one curve if so little changes PEFT's own by more than this."""


class TieError(Exception):
    """A run chose between experts with nearly equal scores: it has no one curve."""


def refuse_ties(model: Any) -> None:
    """Let routers raise `TieError`."""
    for module in model.modules():
        if type(module).__name__.endswith(("TopkRouter", "TopKRouter")):
            module.register_forward_hook(_refuse_tie)


def _refuse_tie(router: Any, _: Any, out: Any) -> None:
    logits, chosen = out[0].detach(), out[2].shape[-1]
    kind = type(router).__name__
    scores = logits.softmax(-1)
    gaps = []
    if kind.startswith("DeepseekV3"):
        scores = logits.sigmoid() + router.e_score_correction_bias
    grouped = kind.startswith("DeepseekV3") or (
        kind.startswith("DeepseekV2") and router.topk_method != "greedy"
    )
    if grouped:
        groups = scores.view(len(scores), router.num_group, -1)
        best = groups.topk(2 if kind.startswith("DeepseekV3") else 1).values.sum(-1)
        gaps.append(_gap(best, router.topk_group))
        kept = torch.zeros_like(best).scatter(1, best.topk(router.topk_group).indices, 1)
        scores = torch.where(kept[..., None] > 0, groups, -1.0).flatten(1)
    gaps.append(_gap(scores, chosen))
    if min(gaps) < CLOSE:
        raise TieError


def _gap(scores: torch.Tensor, chosen: int) -> float:
    """Between the last that is chosen and the first that is not."""
    ordered = scores.sort(descending=True).values
    return float((ordered[:, chosen - 1] - ordered[:, chosen]).min())


# ---- the run ----


def separate_loss(model: Any, case: c.Case, number: int) -> torch.Tensor:
    """Each example on its own: the model's own loss, summed, per counted token of the batch."""
    examples = [e for row in range(c.ROWS) for e in c.sequences(case, number, row)]
    counted = sum(sum(weights[1:]) for _, weights in examples)
    total = torch.tensor(0.0)
    for ids, weights in examples:
        labels = [id_ if weight else -100 for id_, weight in zip(ids, weights, strict=True)]
        total = (
            total
            + model(
                input_ids=torch.tensor([ids]),
                labels=torch.tensor([labels]),
                num_items_in_batch=torch.tensor(counted),
            ).loss
        )
    return total


def reference(
    case: c.Case,
    path: Path,
    checkpoint: Path,
    folder: Path,
    loss: Loss = separate_loss,
    nudge: float = 0.0,
) -> c.Curve:
    """PEFT's run of a case on the model in `checkpoint`, whose GGUF file is at `path`.

    Its learning rates are larger by so much of themselves as `nudge`.
    """
    with GGUFFile.open(path) as file:
        base = Base.of(file)
        first = c.CaseModel(case, file).first
    write_peft(folder / "first", Adapter("first", case.config, first), base)
    model = load_adapter(load_base(case.base, checkpoint), folder / "first", trainable=True)
    hold_blocks(model, case.config.rank)
    refuse_ties(model)
    losses = _train(model, case, loss, 1 + nudge)
    model.save_pretrained(folder / "last")
    return c.Curve(losses, first, read_peft(folder / "last", base).tree)


def first_steady(
    case: c.Case, path: Path, checkpoint: Path, folder: Path, loss: Loss = separate_loss
) -> tuple[c.Case, c.Curve]:
    """The case with the first seed whose run does not hang on rounding, and PEFT's curve."""
    while True:
        try:
            curve, *nudged = (
                reference(case, path, checkpoint, folder, loss, nudge)
                for nudge in (0.0, ROUNDING, -ROUNDING)
            )
        except TieError:
            pass
        else:
            if max(c.largest_difference(curve.losses, n.losses) for n in nudged) < STEADY:
                return case, curve
        case = dataclasses.replace(case, seed=case.seed + 1)


def _train(model: Any, case: c.Case, loss: Loss, speed: float) -> list[float]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for n, p in named if "magnitude" not in n],
            "weight_decay": case.weight_decay,
        },
        {"params": [p for n, p in named if "magnitude" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: speed * case.rate(step))
    model.train()
    losses = []
    for step in range(c.STEPS):
        found = loss(model, case, step % c.BATCHES)
        optimizer.zero_grad()
        found.backward()
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in named], case.clip)
        optimizer.step()
        schedule.step()
        losses.append(float(found.detach()))
    return losses


# ---- files ----


def write_wide() -> None:
    """The config and the shapes of the model whose rows are whole blocks of Q4_K."""
    variant = VARIANTS["v3"]
    config, shapes = describe(dataclasses.replace(variant, config=variant.config | c.WIDE))
    target = c.CURVES / "v3-wide"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    lines = ",\n".join(f"{json.dumps(key)}: {list(shape)}" for key, shape in shapes.items())
    (target / "tensors.json").write_text(f"{{\n{lines}\n}}\n")


def write_curves(cases: list[c.Case]) -> None:
    """Add the curves of cases to the file, and compare ours with them."""
    kept = c.CURVES / "curves.json"
    curves = json.loads(kept.read_text()) if kept.exists() else {}
    curves = {name: curve for name, curve in curves.items() if name in c.CASES}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        file_of = c.ggufs(root)
        checkpoints: dict[str, Path] = {}
        for index, case in enumerate(cases):
            folder = root / str(index)
            folder.mkdir()
            path = file_of(case.base)
            if case.base not in checkpoints:
                checkpoints[case.base] = write_dequantized(case.base, path, root / f"{case.base}.d")
            case, curve = first_steady(case, path, checkpoints[case.base], folder)
            ours = c.train(case, path, folder / "ours")
            moved = {name: rounded(way) for name, way in curve.moved().items()}
            losses = rounded(curve.losses)
            curves[case.name] = {"seed": case.seed, "losses": losses, "moved": moved}
            difference = c.largest_difference(ours.losses, curve.losses)
            drift = c.largest_drift(ours.moved(), curve.moved())
            print(
                f"{case.name} ({case.seed}): {curve.losses[0]:.3f} to {curve.losses[-1]:.3f}, "
                f"ours differs by {difference:.1e}, adapters by {drift:.1e}",
                flush=True,
            )
            lines = [f"{json.dumps(n)}: {json.dumps(curve)}" for n, curve in sorted(curves.items())]
            kept.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


if __name__ == "__main__":
    write_wide()
    write_curves([x for x in c.CASES.values() if any(p in x.name for p in sys.argv[1:] or [""])])

"""Some training steps of localds or of mlx-lm, in a process of its own: see `finetune.py`.

The last line that it prints is JSON: tokens a second and bytes at most of every step, and the bytes
of the model before the first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from finetune_geometry import GEOMETRIES

RATE = 1e-4
MLX_LM = {
    "q_proj": ["self_attn.q_proj"],
    "kv_a_proj_with_mqa": ["self_attn.kv_a_proj_with_mqa"],
    "kv_b_proj": ["self_attn.kv_b_proj"],
    "o_proj": ["self_attn.o_proj"],
    "gate_proj": ["mlp.gate_proj", "mlp.shared_experts.gate_proj"],
    "up_proj": ["mlp.up_proj", "mlp.shared_experts.up_proj"],
    "down_proj": ["mlp.down_proj", "mlp.shared_experts.down_proj"],
    "experts": [f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")],
}
"""What can be trained on both sides, and what mlx-lm calls it."""


@dataclass(frozen=True)
class Setup:
    """What one process trains. `dtype` is that of mlx-lm's model."""

    side: str
    checkpointing: bool
    dtype: str
    geometry: str
    file: str
    cpu: bool
    rank: int
    targets: list[str]
    rows: int
    length: int
    warmup: int
    steps: int


@dataclass
class Measured:
    """Of every step after the warmup, tokens a second, bytes at most, and the loss."""

    weights: int
    speeds: list[float]
    peaks: list[int]
    losses: list[float]

    def add(self, speed: float, peak: int, loss: float) -> None:
        self.speeds.append(speed)
        self.peaks.append(peak)
        self.losses.append(loss)

    def after(self, warmup: int) -> Measured:
        kept = slice(warmup, None)
        return Measured(self.weights, self.speeds[kept], self.peaks[kept], self.losses[kept])


def main() -> None:
    setup = Setup(**json.loads(sys.argv[1]))
    if setup.cpu:
        os.environ["LOCALDS_GPU"] = "cpu"
        mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as folder:
        side = {"localds": train_localds, "mlx-lm": train_mlx_lm}[setup.side]
        measured = side(setup, Path(folder))
    print("\n" + json.dumps(asdict(measured.after(setup.warmup))), flush=True)


def draw_ids(setup: Setup, count: int) -> np.ndarray[Any, Any]:
    """Random tokens int32 [count, rows, length + 1], the same on both sides."""
    vocabulary = GEOMETRIES[setup.geometry].vocabulary
    shape = (count, setup.rows, setup.length + 1)
    return np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)


def train_localds(setup: Setup, folder: Path) -> Measured:
    from localds.finetune.config import AdapterConfig
    from localds.finetune.loop import StepDone, Trainer, TrainSettings
    from localds.finetune.model import TrainModel
    from localds.finetune.trainee import Trainee
    from localds.gguf import GGUFFile
    from localds.ops.mlx_device import find_gpu, open_gpu

    backend, stream = open_gpu(find_gpu())
    # Of experts and routers the file's model would have an auxiliary loss, which mlx-lm has not.
    config = AdapterConfig(rank=setup.rank, alpha=2.0 * setup.rank, targets=tuple(setup.targets))
    with GGUFFile.open(setup.file) as file, mx.stream(stream):
        model = TrainModel(
            file, config, backend, stream, checkpointing=setup.checkpointing, aux_alpha=0.0
        )
        measured = Measured(mx.get_active_memory(), [], [], [])
        settings = TrainSettings(steps=setup.warmup + setup.steps, learning_rate=RATE)

        def note(event: Any) -> None:
            if isinstance(event, StepDone):
                measured.add(event.tokens_per_second, event.peak_memory, event.loss)

        trainee = Trainee(model, setup.file, config)
        Trainer(trainee, RandomBatches(setup), None, settings, folder, note).run()
    return measured


class RandomBatches:
    """localds's form of the tokens, of which all are trained on."""

    fingerprint = "random"
    steps_per_epoch = 1

    def __init__(self, setup: Setup) -> None:
        self._length = setup.length
        self._ids = draw_ids(setup, setup.warmup + setup.steps)

    def length_at(self, step: int) -> int:  # noqa: ARG002
        return self._length

    def batch(self, step: int, micro: int) -> Any:  # noqa: ARG002
        from localds.finetune.data import Batch

        ids = self._ids[step]
        ones = np.ones((len(ids), self._length), np.int32)
        positions = np.tile(np.arange(self._length, dtype=np.int32), (len(ids), 1))
        return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)


def train_mlx_lm(setup: Setup, folder: Path) -> Measured:
    from mlx.optimizers import AdamW
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train

    model = mlx_lm_model(setup)
    measured = Measured(mx.get_active_memory(), [], [], [])

    class Note(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            measured.add(info["tokens_per_second"], mx.get_peak_memory(), info["train_loss"])
            mx.reset_peak_memory()

    steps = setup.warmup + setup.steps
    rows = draw_ids(setup, steps).reshape(-1, setup.length + 1).tolist()
    train(
        model,
        AdamW(RATE, weight_decay=0.0, bias_correction=True),
        [(ids, 0) for ids in rows],
        args=TrainingArgs(
            batch_size=setup.rows,
            iters=steps,
            steps_per_report=1,
            steps_per_save=steps + 1,
            max_seq_length=setup.length + 1,
            adapter_file=str(folder / "adapters.safetensors"),
            grad_checkpoint=setup.checkpointing,
        ),
        training_callback=Note(),
    )
    return measured


def mlx_lm_model(setup: Setup) -> Any:
    """Quantized as mlx-lm does by itself, with random routers, which it begins as zeros."""
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import deepseek_v2
    from mlx_lm.tuner.utils import linear_to_lora_layers

    config = GEOMETRIES[setup.geometry].mlx_lm()
    model = deepseek_v2.Model(deepseek_v2.ModelArgs.from_dict(config))
    for layer in model.layers[1:]:
        layer.mlp.gate.weight = 0.02 * mx.random.normal(layer.mlp.gate.weight.shape)
    model.set_dtype(getattr(mx, setup.dtype))
    nn.quantize(model, group_size=64, bits=4)
    model.freeze()
    keys = {key for target in setup.targets for key in MLX_LM[target]}
    lora = {"rank": setup.rank, "scale": 2.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, config["num_hidden_layers"], lora)
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)
    mx.clear_cache()
    mx.reset_peak_memory()
    return model


if __name__ == "__main__":
    main()

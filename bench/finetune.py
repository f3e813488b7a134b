"""LoRA training beside mlx-lm's: tokens/s of a step and memory at most, in turns on one device.

usage: python bench/finetune.py [--cpu] [--small] [--geometry v2-lite] [--file FILE] [--json FILE]

Both train the same adapters with AdamW on random tokens, all of which count, through their own
training loops: `localds.finetune.loop.Trainer` and `mlx_lm.tuner.trainer.train`. The models have
the same geometry and random weights: ours a GGUF file of Q4_K with the output in Q6_K, mlx-lm's
4 bits in groups of 64, its default. Each run is a process of its own; every round runs all of
them in turns. Speeds are medians of all steps but the first --warmup of each process. Memory is
MLX's own count, `get_peak_memory` of a step, without what it keeps for later use.

The arithmetic differs. We compute in float32 between layers whatever the file's type, mlx-lm in the
type of its model, by default bfloat16: half the bytes of each activation. So mlx-lm is measured in
each of --dtypes, and bfloat16, what its users run, is what our targets are held against: no
slower, at most 0.7 of the memory. On MLX's CPU device neither is what a GPU would show: bfloat16
is slow there, and our weights are larger than the file's, as MLX's form holds scales in float32
(on CUDA and Metal they stay as in the file). So the table also has what steps take beyond weights.
Our buffers for logits and scores are 128 MiB whatever the model: a small one fits into them whole,
and how the sides compare in memory is told by v2-lite with thousands of tokens alone.

Runs where mlx-lm is installed; --cpu takes MLX's CPU device, --small a minute or less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from finetune_geometry import GEOMETRIES, write_gguf
from finetune_sides import MLX_LM, Measured, Setup
from gpu_report import Report

SIDES = Path(__file__).with_name("finetune_sides.py")
MB = 1e6


@dataclass(frozen=True)
class Side:
    """What is trained, and what each of its processes measured."""

    setup: Setup
    runs: list[Measured]

    @property
    def name(self) -> str:
        s = self.setup
        kind = "" if s.side == "localds" else f" {s.dtype}"
        return f"{s.side}{kind}, checkpointing {'on' if s.checkpointing else 'off'}"

    @property
    def speed(self) -> float:
        return statistics.median(speed for run in self.runs for speed in run.speeds)

    @property
    def peak(self) -> int:
        return max(peak for run in self.runs for peak in run.peaks)

    @property
    def weights(self) -> int:
        return self.runs[0].weights


def main() -> None:
    arguments = parse()
    report = Report("finetune", arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or Path(folder) / "random.gguf"
        if not file.exists():
            write_gguf(file, GEOMETRIES[arguments.geometry])
        report.say(f"{arguments.geometry}: file of {file.stat().st_size / MB:.0f} MB")
        sides = [Side(setup, []) for setup in setups(arguments, file)]
        run_in_turns(sides, arguments.rounds, report)
    for side in sides:
        tell(side, report)
    for side in sides:
        if side.setup.side != "localds":
            compare(sides, side, report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="MLX's CPU device")
    parser.add_argument("--small", action="store_true", help="a tiny model, few steps")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="v2-lite, with --cpu a quarter")
    parser.add_argument("--file", type=Path, help="the GGUF file, written if it is not there")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=MLX_LM,
        default=["q_proj", "kv_a_proj_with_mqa", "o_proj"],
        help="adapted projections",
    )
    parser.add_argument("--rows", type=int, help="texts in a batch")
    parser.add_argument("--length", type=int, help="tokens of a text")
    parser.add_argument("--dtypes", nargs="+", help="of mlx-lm's model")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--rounds", type=int, help="processes of each kind")
    parser.add_argument("--steps", type=int, help="measured in each process")
    parser.add_argument("--warmup", type=int, help="steps before these")
    parser.add_argument("--json", type=Path, help="add figures to this file, one a line")
    arguments = parser.parse_args()
    set_defaults(arguments)
    return arguments


def set_defaults(arguments: argparse.Namespace) -> None:
    sizes = {"geometry": "v2-lite", "rows": 4, "length": 1024, "rounds": 3, "steps": 5, "warmup": 2}
    sizes |= {"dtypes": ["bfloat16"]}
    if arguments.cpu:
        sizes |= {"geometry": "quarter", "rows": 2, "length": 256, "rounds": 2, "steps": 2}
        sizes |= {"warmup": 1, "dtypes": ["bfloat16", "float32"]}
    if arguments.small:
        sizes |= {"geometry": "tiny", "rows": 2, "length": 64, "rounds": 1, "steps": 1, "warmup": 1}
        sizes |= {"dtypes": ["float32"]}
    for name, value in sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def setups(arguments: argparse.Namespace, file: Path) -> list[Setup]:
    """Neighbours are what is compared."""
    found: list[Setup] = []
    for checkpointing in arguments.checkpointing:
        ours = Setup(
            side="localds",
            checkpointing=checkpointing == "on",
            dtype="float32",
            geometry=arguments.geometry,
            file=str(file),
            cpu=arguments.cpu,
            rank=arguments.rank,
            targets=arguments.targets,
            rows=arguments.rows,
            length=arguments.length,
            warmup=arguments.warmup,
            steps=arguments.steps,
        )
        found += [ours, *(replace(ours, side="mlx-lm", dtype=one) for one in arguments.dtypes)]
    return found


def run_in_turns(sides: Sequence[Side], rounds: int, report: Report) -> None:
    for number in range(rounds):
        for side in sides:
            run = run_apart(side.setup)
            side.runs.append(run)
            speed = statistics.median(run.speeds)
            report.say(f"round {number + 1}, {side.name}: {speed:.0f} tokens/s")


def run_apart(setup: Setup) -> Measured:
    command = [sys.executable, str(SIDES), json.dumps(asdict(setup))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{setup.side} ended with status {done.returncode}: {done.stdout[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def tell(side: Side, report: Report) -> None:
    speeds = [statistics.median(run.speeds) for run in side.runs]
    report.figure(f"{side.name}: speed", speeds, "tokens/s")
    note = f"weights {side.weights / MB:.0f}, beyond them {(side.peak - side.weights) / MB:.0f}"
    report.figure(f"{side.name}: memory at most", side.peak / MB, "MB", note)
    report.figure(f"{side.name}: loss", side.runs[0].losses, detail=True)


def compare(sides: Sequence[Side], peer: Side, report: Report) -> None:
    """Ours over mlx-lm's with the same checkpointing."""
    ours = next(
        side
        for side in sides
        if side.setup.side == "localds" and side.setup.checkpointing == peer.setup.checkpointing
    )
    beyond = (ours.peak - ours.weights) / (peer.peak - peer.weights)
    note = f"beyond weights {beyond:.2f}; speed {ours.speed / peer.speed:.2f}"
    report.figure(f"memory of ours / {peer.name}", ours.peak / peer.peak, "", note)


if __name__ == "__main__":
    main()

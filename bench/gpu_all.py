"""All measurements in order, each in a process of its own with a time limit, within --minutes.

Writes to the folder --out: `log.txt` with all output, `figures.jsonl` with figures as they come,
`summary.json` with all of them and how the steps ended, and `results.md`, tables for the docs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gpu_report import Report
from gpu_table import tables

SCRIPT = Path(__file__).with_name("gpu.py")
DEMO = Path(__file__).parent.parent / "localds" / "demo" / "guide.gguf"
STEPS = ("facts", "kernels", "parity", "model", "split", "llama")
STEPS += ("context", "peer", "products", "profile")
LEAST_SECONDS = 15
"""A step is not begun with less left."""
PATIENCE_SECONDS = 5


@dataclass(frozen=True)
class Step:
    name: str
    options: list[str]
    seconds: float
    """The most it may take."""


@dataclass
class Ended:
    name: str
    how: str
    seconds: float


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--minutes", type=float, default=13)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", nargs="+", choices=STEPS, help="no other steps than these")
    parser.add_argument("--parity", type=Path, help="a folder that make-parity wrote")
    parser.add_argument("--vram", default="4GiB", help="of the split model")
    parser.add_argument("--bench", type=Path, help="a llama-bench built for the GPU")
    parser.add_argument("--n-cpu-moe", type=int, help="for llama-bench, see `llama`")


def steps(arguments: argparse.Namespace) -> list[Step]:
    """The most important first."""
    file = str(arguments.file)
    parity = [str(path) for path in (arguments.parity, DEMO) if path is not None]
    # A small model would fit.
    split = [] if arguments.small else ["--vram", arguments.vram]
    wanted = [
        Step("facts", [], 40),
        Step("kernels", [], 60),
        Step("parity", parity, 120),
        Step("model", [file], 150),
        Step("split", [file, *split], 180),
        Step("context", [file], 180),
        Step("peer", [], 90),
        Step("products", [], 90),
        Step("profile", [file], 60),
    ]
    if arguments.bench is not None:
        llama = [file, "--bench", str(arguments.bench)]
        if arguments.n_cpu_moe is not None:
            llama += ["--n-cpu-moe", str(arguments.n_cpu_moe)]
        wanted.insert(5, Step("llama", llama, 240))
    return [step for step in wanted if not arguments.only or step.name in arguments.only]


def run(arguments: argparse.Namespace, report: Report) -> None:
    deadline = time.monotonic() + 60 * arguments.minutes
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    figures = out / "figures.jsonl"
    figures.unlink(missing_ok=True)
    ended: list[Ended] = []
    with (out / "log.txt").open("w+") as log, tempfile.TemporaryDirectory() as folder:
        # Speeds of the machine and uses of experts are those of these steps alone.
        variables = ("XDG_CACHE_HOME", "XDG_STATE_HOME")
        environment = os.environ | {name: str(Path(folder) / name) for name in variables}
        for step in steps(arguments):
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS:
                ended.append(Ended(step.name, "left out: no time", 0))
                continue
            ended.append(run_step(step, min(step.seconds, left), arguments, log, environment))
            write_results(out, figures, ended)
            report.say(f"== {step.name}: {ended[-1].how}, {ended[-1].seconds:.0f} s")
    write_results(out, figures, ended)
    report.say((out / "results.md").read_text())


def run_step(
    step: Step,
    seconds: float,
    arguments: argparse.Namespace,
    log: IO[str],
    environment: dict[str, str],
) -> Ended:
    options = [*step.options, "--json", str(arguments.out / "figures.jsonl")]
    options += ["--cpu"] if arguments.cpu else []
    options += ["--small"] if arguments.small else []
    command = [sys.executable, "-u", str(SCRIPT), step.name, *options]
    started = time.monotonic()
    log.write(f"\n$ {shlex.join(command)}\n")
    log.flush()
    # A session of its own, so that whatever it started ends with it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    how = "done"
    try:
        if status := process.wait(seconds):
            how = f"failed, status {status}: {last_line(log)}"
    except subprocess.TimeoutExpired:
        end(process)
        how = f"stopped after {seconds:.0f} s"
    return Ended(step.name, how, time.monotonic() - started)


def last_line(log: IO[str]) -> str:
    log.seek(0)
    return log.read().rstrip().rpartition("\n")[2][:200]


def end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


def write_results(out: Path, figures: Path, ended: list[Ended]) -> None:
    lines = figures.read_text().splitlines() if figures.exists() else []
    # Who was killed may have left half a line.
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]
    summary = {"steps": [asdict(step) for step in ended], "figures": records}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    (out / "results.md").write_text(tables(records, {e.name: e.how for e in ended}))

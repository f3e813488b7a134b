"""llama.cpp's llama-bench and `localds bench` on the same file with the same GPU memory, in turns.

Without --n-cpu-moe both have everything on the GPU. With it, llama-bench keeps the experts of the
first so many layers off the GPU, and localds may take as much of its memory as llama-bench took in
the same round, or --vram. A ratio is the median of the rounds' ratios, ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_report import Report
from gpu_vram import vram_watched

SHORT, LONG, TOKENS = 512, 8192, 64
SMALL_SHORT, SMALL_LONG, SMALL_TOKENS = 32, 64, 4

Speeds = dict[str, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--bench", type=Path, required=True, help="a llama-bench built for the GPU")
    parser.add_argument("--n-cpu-moe", type=int)
    parser.add_argument("--vram", help="for localds, such as 4GiB")
    parser.add_argument("--rounds", type=int, default=3)


def run(arguments: argparse.Namespace, report: Report) -> None:
    theirs: dict[str, list[float]] = defaultdict(list)
    ours: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        with vram_watched() as most:
            speeds = run_llama(arguments)
        vram = arguments.vram
        if arguments.n_cpu_moe is not None and vram is None:
            if not most:
                sys.exit("llama: no driver says how much llama-bench took; give --vram")
            vram = str(most[0])
            report.figure("memory of llama-bench", most[0] / 1e9, "GB")
        for test, speed in speeds.items():
            theirs[test].append(speed)
        for test, speed in run_localds(arguments, vram).items():
            ours[test].append(speed)
    for test, speeds in ours.items():
        report.figure(f"localds {test}", speeds, "tokens/s")
        report.figure(f"llama-bench {test}", theirs[test], "tokens/s")
        ratio = statistics.median(a / b for a, b in zip(speeds, theirs[test], strict=True))
        report.figure(f"ratio {test}", ratio)


def run_llama(arguments: argparse.Namespace) -> Speeds:
    layers = "0" if arguments.cpu else "99"
    command = [str(arguments.bench), "-m", str(arguments.file), "-o", "json", "-ngl", layers]
    if arguments.n_cpu_moe is not None:
        command += ["-ncmoe", str(arguments.n_cpu_moe)]
    short, long, tokens = shape(arguments)
    return speeds_of([*command, "-r", "1", "-p", short, "-n", tokens, "-d", f"0,{long}"])


def run_localds(arguments: argparse.Namespace, vram: str | None) -> Speeds:
    command = [sys.executable, "-P", "-m", "localds", "bench", str(arguments.file), "--json"]
    command += ["--device", "gpu", *(["--vram", vram] if vram else [])]
    short, long, tokens = shape(arguments)
    return speeds_of([*command, "-r", "1", "-p", short, "-n", tokens, "-d", f"0,{long}"])


def shape(arguments: argparse.Namespace) -> tuple[str, str, str]:
    sizes = (SMALL_SHORT, SMALL_LONG, SMALL_TOKENS) if arguments.small else (SHORT, LONG, TOKENS)
    short, long, tokens = map(str, sizes)
    return short, long, tokens


def speeds_of(command: Sequence[str]) -> Speeds:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{' '.join(command)}\nfailed, status {ran.returncode}:\n{ran.stderr[-2000:]}")
    return {test_of(record): float(record["avg_ts"]) for record in json.loads(ran.stdout)}


def test_of(record: dict[str, Any]) -> str:
    tokens, kind = record["n_prompt"], "pp"
    if record["n_gen"]:
        tokens, kind = record["n_gen"], "tg"
    return f"{kind}{tokens} at {record['n_depth']}"

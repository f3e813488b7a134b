"""`localds convert` and llama.cpp's converter and quantizer on the same checkpoint, in turn.

    python bench/convert_side_by_side.py CHECKPOINT --llama-source LLAMA.CPP --llama-bin BUILD/bin
        [--imatrix FILE] [--types Q8_0 Q4_K_M] [--threads 2] [--rounds 3] [--work FOLDER]

Times whole commands. llama.cpp takes two steps for K-quants: a BF16 file, then llama-quantize; the
second one alone is timed against ours on that same file. Peak memory is the largest resident set
of a process, in MiB; mapped pages of files count in it. The interpreter that runs this script runs
llama.cpp's converter, and so needs torch and transformers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    seconds: float
    peak_mib: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, max(self.peak_mib, other.peak_mib))


def run(command: Sequence[str | Path]) -> Cost:
    """Run a command to its end; its output is shown if it fails."""
    os.sync()
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            log.seek(0)
            sys.exit(f"{command[0]} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    return Cost(seconds, usage.ru_maxrss / 1024)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.intermediate: Path = args.work / "intermediate-bf16.gguf"
        self.threads = str(args.threads)

    def ours(self, source: Path, kind: str, matrix: bool) -> Cost:
        output = self.args.work / "ours.gguf"
        command = [sys.executable, "-P", "-m", "localds", "convert", source, "-o", output]
        command += ["--type", kind, "--threads", self.threads, "--force"]
        if matrix:
            command += ["--imatrix", self.args.imatrix]
        return run(command)

    def their_convert(self, kind: str, output: Path) -> Cost:
        script = self.args.llama_source / "convert_hf_to_gguf.py"
        return run(
            [sys.executable, script, self.args.checkpoint, "--outfile", output, "--outtype", kind]
        )

    def their_quantize(self, kind: str, matrix: bool) -> Cost:
        command = [self.args.llama_bin / "llama-quantize"]
        if matrix:
            command += ["--imatrix", self.args.imatrix]
        output = self.args.work / "theirs.gguf"
        return run([*command, self.intermediate, output, kind, self.threads])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-source", type=Path, required=True)
    parser.add_argument("--llama-bin", type=Path, required=True)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path())
    args = parser.parse_args()
    bench = Bench(args)
    source_gb = sum(f.stat().st_size for f in args.checkpoint.glob("*.safetensors")) / 1e9

    costs: dict[tuple[str, str], list[Cost]] = defaultdict(list)
    cases: dict[str, tuple[Callable[[], Cost], Callable[[], Cost]]] = {}
    for kind in args.types:
        for matrix in (False, True) if args.imatrix and kind != "Q8_0" else (False,):
            add_cases(cases, bench, kind, matrix)
    for number in range(args.rounds):
        for case, (ours, theirs) in cases.items():
            costs[case, "ours"].append(ours())
            costs[case, "theirs"].append(theirs())
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)

    print(f"Source: {source_gb:.2f} GB\n")
    print("| case | localds s (GB/s, MiB) | llama.cpp s (GB/s, MiB) | time ratio |")
    print("|---|---|---|---|")
    for case in cases:
        a, b = (costs[case, side] for side in ("ours", "theirs"))
        ratio = statistics.median(x.seconds / y.seconds for x, y in zip(a, b, strict=True))
        print(f"| {case} | {cell(a, source_gb)} | {cell(b, source_gb)} | {ratio:.2f} |")


def add_cases(
    cases: dict[str, tuple[Callable[[], Cost], Callable[[], Cost]]],
    bench: Bench,
    kind: str,
    matrix: bool,
) -> None:
    with_matrix = " with matrix" if matrix else ""
    checkpoint, output = bench.args.checkpoint, bench.args.work / "theirs.gguf"
    if kind in ("F16", "BF16", "Q8_0"):
        cases[kind] = (
            lambda: bench.ours(checkpoint, kind, False),
            lambda: bench.their_convert(kind.lower(), output),
        )
        return
    cases[f"{kind}{with_matrix}, from the checkpoint"] = (
        lambda: bench.ours(checkpoint, kind, matrix),
        lambda: (
            bench.their_convert("bf16", bench.intermediate) + bench.their_quantize(kind, matrix)
        ),
    )
    cases[f"{kind}{with_matrix}, from the BF16 file"] = (
        lambda: bench.ours(bench.intermediate, kind, matrix),
        lambda: bench.their_quantize(kind, matrix),
    )


def cell(costs: list[Cost], source_gb: float) -> str:
    seconds = statistics.median(cost.seconds for cost in costs)
    peak = max(cost.peak_mib for cost in costs)
    return f"{seconds:.1f} ({source_gb / seconds:.2f}, {peak:.0f})"


if __name__ == "__main__":
    main()

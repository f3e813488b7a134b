"""localds and llama.cpp on the same file, in turn, in one run; medians and their ratio.

    python bench/side_by_side.py MODEL.gguf --llama-bench PATH/llama-bench [-p 512] [-n 32]
                                 [-d 0 4096] [--threads 2] [--rounds 5]

Each round starts both programs anew, so that drift of the machine's speed meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict

Key = tuple[int, int, int]  # n_prompt, n_gen, n_depth


def run_localds(args: argparse.Namespace) -> dict[Key, float]:
    command = [sys.executable, "-P", "-m", "localds", "bench", args.model, "--json", "-r", "1"]
    command += ["-p", str(args.prompt), "-n", str(args.generate), "--threads", str(args.threads)]
    command += [word for depth in args.depth for word in ("-d", str(depth))]
    return read_records(command)


def run_llama(args: argparse.Namespace) -> dict[Key, float]:
    command = [args.llama_bench, "-m", args.model, "-o", "json", "-r", "1"]
    command += ["-p", str(args.prompt), "-n", str(args.generate), "-t", str(args.threads)]
    command += ["-d", ",".join(map(str, args.depth)), "-fa", args.flash_attention]
    return read_records(command)


def read_records(command: list[str]) -> dict[Key, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return {(r["n_prompt"], r["n_gen"], r["n_depth"]): r["avg_ts"] for r in json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=32)
    parser.add_argument("-d", "--depth", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flash-attention", default="0", help="llama-bench's -fa")
    args = parser.parse_args()

    ours: dict[Key, list[float]] = defaultdict(list)
    theirs: dict[Key, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        for samples, run in ((ours, run_localds), (theirs, run_llama)):
            for key, speed in run(args).items():
                samples[key].append(speed)
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)

    print("| test | depth | localds tokens/s | llama.cpp tokens/s | ratio |\n|---|---|---|---|---|")
    for key in sorted(ours, key=lambda k: (k[2], -k[0])):
        n_prompt, n_gen, depth = key
        test = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
        a, b = statistics.median(ours[key]), statistics.median(theirs[key])
        ratio = statistics.median(x / y for x, y in zip(ours[key], theirs[key], strict=True))
        print(f"| {test} | {depth} | {a:.2f} | {b:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

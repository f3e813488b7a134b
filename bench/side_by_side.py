"""localds and other programs on the same file, in turn, in one run; medians and their ratios.

    python bench/side_by_side.py MODEL.gguf --peer NAME=PATH/llama-bench [--peer ...]
        [--peer-args NAME="--repack 0"] [-p 512 4096] [-n 32] [-d 0 4096] [--threads 2]
        [--rounds 5] [--first-token] [--completion-args NAME="--no-repack"]

A peer is the llama-bench of llama.cpp or of ik_llama.cpp. The latter has no -d: at a depth it
tells the speed of generation only. Each round starts every program anew, so that drift of the
machine's speed meets all. A ratio is the median of the rounds' ratios, ours over theirs. Peak
memory is the largest resident set, in which mapped pages of the file count; that of `localds bench`
is at least the 1 GiB with which it measures the machine.

--first-token also times commands from their start to the first byte of the reply: `localds chat`
and the llama-completion beside a peer's llama-bench. All get the same raw prompt and context, and
llama-completion skips its warm-up. `-p 0 -n 0` leaves the other tests out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

PROMPT = "The quick brown fox jumps over the lazy dog, and then it"
CONTEXT = 512

Test = tuple[str, str]  # what, and at which depth
Figures = dict[Test, float]
Samples = dict[Test, dict[str, list[float]]]  # of each program, a figure a round


@dataclass(frozen=True)
class Program:
    name: str
    bench: list[str]
    first_token: list[str] | None


def localds(args: argparse.Namespace) -> Program:
    command = [sys.executable, "-P", "-m", "localds"]
    bench = [*command, "bench", args.model, "--json", "-r", "1", "-t", str(args.threads)]
    bench += ["-p", *map(str, args.prompt), "-n", str(args.generate), "-d", *map(str, args.depth)]
    chat = [*command, "chat", args.model, "--raw", *first_token_options(args)]
    return Program("localds", bench, chat)


def peer(name: str, path: str, args: argparse.Namespace) -> Program:
    bench = [path, "-m", args.model, "-o", "json", "-r", "1", "-t", str(args.threads)]
    prompts, generate = ",".join(map(str, args.prompt)), str(args.generate)
    usage = subprocess.run([path, "--help"], capture_output=True, text=True, check=False).stdout
    if "--n-depth" in usage:
        bench += ["-p", prompts, "-n", generate, "-d", ",".join(map(str, args.depth))]
    else:
        bench += ["-p", prompts, "-n", generate] if 0 in args.depth else ["-p", "0", "-n", "0"]
        for depth in filter(None, args.depth if args.generate else ()):
            bench += ["-gp", f"{depth},{generate}"]
    completion = Path(path).with_name("llama-completion")
    once = [str(completion), "-m", args.model, "-no-cnv", "--no-display-prompt", "--no-warmup"]
    once += [*first_token_options(args), *args.completion_args.get(name, [])]
    bench += args.peer_args.get(name, [])
    return Program(name, bench, once if completion.exists() else None)


def first_token_options(args: argparse.Namespace) -> list[str]:
    threads, context = str(args.threads), str(CONTEXT)
    return ["-p", PROMPT, "-n", "1", "--temp", "0", "-c", context, "-t", threads]


@dataclass(frozen=True)
class Ran:
    output: bytes
    first_byte_seconds: float
    peak_mib: float


def run(command: Sequence[str]) -> Ran:
    """Run a command to its end. One that fails ends this script with the end of its stderr."""
    # localds is not to remember the model as the one used last.
    environment = {**os.environ, "XDG_STATE_HOME": os.devnull}
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
        with cast("IO[bytes]", process.stdout) as stdout:
            first = stdout.read(1)
            seconds = time.perf_counter() - started
            output = first + stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            end = errors.read().decode(errors="replace")[-2000:]
            sys.exit(f"{shlex.join(command)}\nfailed with status {process.returncode}:\n{end}")
    return Ran(output, seconds, usage.ru_maxrss / 1024)


def measure_speeds(program: Program) -> Figures:
    ran = run(program.bench)
    figures = {test_of(record): record["avg_ts"] for record in json.loads(ran.output)}
    return figures | {("peak memory, MiB", ""): ran.peak_mib}


def test_of(record: dict[str, Any]) -> Test:
    prompt, generate = record["n_prompt"], record["n_gen"]
    # Without a depth, -gp: generation after a prompt, whose own time does not count.
    depth = record.get("n_depth", prompt if generate else 0)
    return f"tg{generate}" if generate else f"pp{prompt}", str(depth)


def measure_first_token(program: Program) -> Figures:
    ran = run(program.first_token or [])
    return {("seconds", "0"): ran.first_byte_seconds, ("peak memory, MiB", ""): ran.peak_mib}


def collect(
    rounds: int, programs: Sequence[Program], measure: Callable[[Program], Figures]
) -> Samples:
    samples: Samples = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for program in programs:
            for test, figure in measure(program).items():
                samples[test][program.name].append(figure)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return samples


def print_table(title: str, unit: str, programs: Sequence[Program], samples: Samples) -> None:
    ours, *peers = (program.name for program in programs)
    columns = [title, "depth", f"{ours}{unit}"]
    columns += [word for name in peers for word in (f"{name}{unit}", "ratio")]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (what, depth), of in samples.items():
        if ours in of:
            cells = [word for name in peers for word in peer_cells(of[ours], of[name])]
            print(f"| {' | '.join([what, depth, figure(of[ours]), *cells])} |")


def peer_cells(ours: list[float], theirs: list[float]) -> tuple[str, str]:
    if not theirs:
        return "", ""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return figure(theirs), f"{ratio:.2f}"


def figure(samples: list[float]) -> str:
    median = statistics.median(samples)
    return f"{median:.0f}" if median >= 1000 else f"{median:.2f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--peer", type=named, action="append", required=True)
    parser.add_argument("--peer-args", type=named, action="append", default=[])
    parser.add_argument("-p", "--prompt", type=int, nargs="+", default=[512])
    parser.add_argument("-n", "--generate", type=int, default=32)
    parser.add_argument("-d", "--depth", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-token", action="store_true")
    parser.add_argument("--completion-args", type=named, action="append", default=[])
    args = parser.parse_args()
    known = {name for name, _ in args.peer}
    for name, _ in args.peer_args + args.completion_args:
        if name not in known:
            parser.error(f"arguments for {name}, but no --peer has that name")
    args.peer_args = {name: shlex.split(words) for name, words in args.peer_args}
    args.completion_args = {name: shlex.split(words) for name, words in args.completion_args}
    return args


def named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main() -> None:
    args = parse_arguments()
    programs = [localds(args), *(peer(name, path, args) for name, path in args.peer)]
    if any(args.prompt) or args.generate:
        samples = collect(args.rounds, programs, measure_speeds)
        print_table("test", " tokens/s", programs, samples)
    if args.first_token:
        able = [program for program in programs if program.first_token]
        for program in able:  # brings the file into memory
            measure_first_token(program)
        samples = collect(args.rounds, able, measure_first_token)
        print_table("first token", "", able, samples)


if __name__ == "__main__":
    main()

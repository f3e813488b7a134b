"""localds and a peer on a model that is larger than the memory they may take.

    python bench/offload.py MODEL.gguf --memory 5GiB [--peer PATH/llama-bench]
        [--peer-args "--repack 0 -lm mmap"] [-p 512] [-n 64] [--peer-generate 8]
        [--localds-args "--cache-type q8_0"] [--without-localds] [--threads 2] [--seconds 600]

Each program and test has a process of its own, in a new control group that may take `--memory` and
no swap; file cache counts. All file caches are dropped first. `localds bench` gets no --ram: its
default has to find the group's limit. The peer is the llama-bench of llama.cpp, which maps the file
by default; what it has not told after `--seconds` is left blank.

The table tells, for each process: tokens a second, ours over the peer's, what the machine could do
at best, the share of experts found in memory, what a token read from disk and how long it waited,
as `localds bench --json` tells them; and what the kernel saw of the whole process, loading and
warm-up included: gigabytes read, seconds, the group's peak, how often it met its limit, and
processes killed for it. Version 1 of Linux 6.18 counts no meetings with the limit, only kills.
The disk's own speed is that of random reads of 6 MiB around the cache, two at once, just before.
How far the kernel reads ahead is told since mapped files depend on it.

Makes groups of version 1 below its own, so that limits of its own go on holding, and of version 2
below the nearest that hands `memory` on to its children; both take root, or a delegated group.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
PIECE = 6 << 20
IN_FLIGHT = 2
DISK_SECONDS = 2.0
PATIENCE_SECONDS = 10.0  # for a group's last process to be gone
COLUMNS = (
    *("test", "program", "tokens/s", "ratio", "at best", "by", "in memory, %", "MB a token"),
    *("read, GB/s", "waited, ms", "disk alone, GB/s", "read in all, GB", "seconds"),
    *("peak, MiB", "met limit", "killed"),
)


@dataclass(frozen=True)
class Test:
    program: str
    prompt: int
    generate: int
    command: list[str]

    @property
    def name(self) -> str:
        return f"tg{self.generate}" if self.generate else f"pp{self.prompt}"


@dataclass(frozen=True)
class Group:
    """A control group that limits memory, and the names of its files."""

    folder: Path
    version: int

    def write(self, name: str, value: object) -> None:
        (self.folder / name).write_text(str(value))

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def limit(self, size: int) -> None:
        """Of memory, and none of swap."""
        if self.version == 1:
            memory, both = ("memory.limit_in_bytes", size), ("memory.memsw.limit_in_bytes", size)
        else:
            memory, both = ("memory.max", size), ("memory.swap.max", 0)
        self.write(*memory)
        if (self.folder / both[0]).exists():
            self.write(*both)

    def peak(self) -> int:
        return int(self.read("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"))

    def met_limit(self) -> int:
        """How often memory was asked for beyond the limit, so that some had to be taken back."""
        if self.version == 2:
            return self.event("max")
        # Where swap is accounted for, the limit of both is met first.
        names = ("memory.failcnt", "memory.memsw.failcnt")
        return sum(int(self.read(name)) for name in names if (self.folder / name).exists())

    def killed(self) -> int:
        return self.event("oom_kill")

    def event(self, name: str) -> int:
        text = self.read("memory.oom_control" if self.version == 1 else "memory.events")
        found = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
        return int(found[1]) if found else 0


@dataclass
class Outcome:
    """What became of a process; its figures are empty if it did not get to tell them."""

    test: Test
    figures: dict[str, Any] = field(default_factory=dict)
    disk_gbs: float = 0.0
    read_gb: float | None = None
    seconds: float = 0.0
    peak: int = 0
    met_limit: int = 0
    killed: int = 0


def own_group(wanted: str) -> Path | None:
    """The path of this process's group that `memory` (version 1) or nothing (version 2) names."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if wanted in controllers.split(","):
            return Path(path.lstrip("/"))
    return None


def parent_group() -> tuple[Path, int]:
    """The group to make groups in, and the version of the interface."""
    if (own := own_group("memory")) is not None and (V1 / "cgroup.procs").exists():
        return next(level for level in (V1 / own, V1) if level.is_dir()), 1
    if (own := own_group("")) is not None:
        for level in (V2 / own, *(V2 / own).parents):
            handed_on = level / "cgroup.subtree_control"
            if handed_on.exists() and "memory" in handed_on.read_text().split():
                return level, 2
    sys.exit("no control group hands on `memory`: mount version 1's, or delegate version 2's")


@contextlib.contextmanager
def group(size: int) -> Iterator[Group]:
    """A new group that may take `size` bytes, removed at the end."""
    parent, version = parent_group()
    folder = parent / f"localds-offload-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        sys.exit(f"cannot make the control group {folder}: {error.strerror}; try as root")
    try:
        made = Group(folder, version)
        made.limit(size)
        yield made
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            folder.rmdir()
        except OSError:  # its last process may still be going
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        sys.exit(f"cannot drop the caches: {error.strerror}; try as root")


def disk_speed(model: Path) -> float:
    """Gigabytes a second of random reads of `PIECE` bytes around the cache, `IN_FLIGHT` at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as readers:
        counts = list(readers.map(lambda seed: read_randomly(model, seed), range(IN_FLIGHT)))
    return sum(counts) / (time.perf_counter() - started) / 1e9


def read_randomly(model: Path, seed: int) -> int:
    places = random.Random(f"{seed} {time.time()}")  # noqa: S311  not for secrets
    piece = mmap.mmap(-1, PIECE)
    file = os.open(model, os.O_RDONLY | os.O_DIRECT)
    last = max(model.stat().st_size - PIECE, 0) // mmap.PAGESIZE
    until = time.perf_counter() + DISK_SECONDS
    done = 0
    try:
        while time.perf_counter() < until:
            done += os.preadv(file, [piece], places.randrange(last + 1) * mmap.PAGESIZE)
    finally:
        os.close(file)
    return done


def bytes_read(model: Path) -> int | None:
    """By all from the disk of `model` since the machine started; None where nobody counts."""
    device = model.stat().st_dev
    wanted = [str(os.major(device)), str(os.minor(device))]
    for line in Path("/proc/diskstats").read_text().splitlines():
        words = line.split()
        if words[:2] == wanted:
            return int(words[5]) * 512  # sectors, of 512 bytes on every disk
    return None


def read_ahead(model: Path) -> str:
    """KiB that the kernel reads around a page of a mapped file on this disk."""
    device = model.stat().st_dev
    file = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return file.read_text().strip() if file.exists() else "unknown"


def measure(test: Test, args: argparse.Namespace) -> Outcome:
    print(f"{test.name} of {test.program}", file=sys.stderr)
    drop_caches()
    outcome = Outcome(test, disk_gbs=disk_speed(args.model))
    with group(args.memory) as limited:
        before = bytes_read(args.model)
        started = time.perf_counter()
        outcome.figures = run_in(limited, test, args.seconds)
        outcome.seconds = time.perf_counter() - started
        if before is not None and (after := bytes_read(args.model)) is not None:
            outcome.read_gb = (after - before) / 1e9
        outcome.peak, outcome.met_limit = limited.peak(), limited.met_limit()
        outcome.killed = limited.killed()
    return outcome


def run_in(limited: Group, test: Test, seconds: float) -> dict[str, Any]:
    """Run the test in the group. Returns its record, or nothing if it failed or took too long."""
    procs = str(limited.folder / "cgroup.procs")
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', procs]
    environment = {**os.environ, "XDG_STATE_HOME": os.devnull}  # not to be the model used last
    with tempfile.TemporaryFile() as errors:
        try:
            ran = subprocess.run(
                [*enter, *test.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"  stopped after {seconds:.0f} s", file=sys.stderr)
            return {}
        if ran.returncode == 0:
            return dict(json.loads(ran.stdout)[0])
        errors.seek(0)
        end = errors.read().decode(errors="replace")[-2000:]
        command = shlex.join(test.command)
        print(f"{command}\nfailed, status {ran.returncode}:\n{end}", file=sys.stderr)
        return {}


def tests(args: argparse.Namespace) -> Iterator[Test]:
    """Both programs' prefill, then both programs' generation."""
    common = ["-r", "1", "-t", str(args.threads)]
    ours = [sys.executable, "-P", "-m", "localds", "bench", str(args.model), "--json", *common]
    ours += args.localds_args
    theirs = [str(args.peer), "-m", str(args.model), "-o", "json", *common, *args.peer_args]
    slower = args.generate if args.peer_generate is None else args.peer_generate
    for prompt, generate, peer_generate in ((args.prompt, 0, 0), (0, args.generate, slower)):
        if not args.without_localds and (prompt or generate):
            yield make_test("localds", ours, prompt, generate)
        if args.peer and (prompt or peer_generate):
            yield make_test("peer", theirs, prompt, peer_generate)


def make_test(program: str, command: list[str], prompt: int, generate: int) -> Test:
    command = [*command, "-p", str(prompt), "-n", str(generate)]
    return Test(program, prompt, generate, command)


def print_table(outcomes: list[Outcome]) -> None:
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for outcome in outcomes:
        print(f"| {' | '.join(map(cell, row(outcome, outcomes)))} |")


def row(outcome: Outcome, outcomes: list[Outcome]) -> list[float | str | None]:
    told, test = outcome.figures.get, outcome.test
    return [
        *(test.name, test.program, told("avg_ts"), ratio(outcome, outcomes)),
        *(told("limit_ts"), told("limit_by"), scaled(told("hit_rate"), 100)),
        *(scaled(told("read_bytes_per_token"), 1e-6), told("read_gbps"), told("stall_ms")),
        *(outcome.disk_gbs, outcome.read_gb, outcome.seconds, outcome.peak / 2**20),
        *(outcome.met_limit, outcome.killed),
    ]


def ratio(outcome: Outcome, outcomes: list[Outcome]) -> float | None:
    """Ours over the peer's, in our rows."""
    if outcome.test.program != "localds" or not outcome.figures:
        return None
    for other in outcomes:
        same = bool(other.test.generate) == bool(outcome.test.generate)
        if same and other.test.program == "peer" and other.figures:
            return float(outcome.figures["avg_ts"] / other.figures["avg_ts"])
    return None


def scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.2f}"
    return "" if value is None else str(value)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", type=size, required=True, help="such as 5GiB")
    parser.add_argument("--peer", type=Path, help="a llama-bench")
    parser.add_argument("--peer-args", type=shlex.split, default=[])
    parser.add_argument("--localds-args", type=shlex.split, default=[])
    parser.add_argument("--without-localds", action="store_true")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=64)
    parser.add_argument("--peer-generate", type=int, help="fewer, since a peer may be slow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="the most for one process")
    return parser.parse_args()


def size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GiB")
    number, unit = float(match[1]), match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return int(number * base ** " KMGT".index(unit[0] if unit else " "))


def main() -> None:
    args = parse_arguments()
    outcomes = [measure(test, args) for test in tests(args)]
    sizes = f"{args.model.stat().st_size / 1e9:.1f} GB, in {args.memory / 2**20:.0f} MiB"
    print(f"{args.model}, {sizes}, read-ahead {read_ahead(args.model)} KiB")
    print_table(outcomes)


if __name__ == "__main__":
    main()

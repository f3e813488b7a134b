"""Measure the GPU path: is it right, how fast, how much memory, and others beside it.

usage: python bench/gpu.py COMMAND [--cpu] [--small] [--json FILE] ...

    all FILE            everything below in order, each in a process of its own, within --minutes
    facts               the GPU, and what it does at best
    kernels             our kernels' own proofs, and how long they take to compile
    parity FILE...      logits beside MLX's operations on the CPU, or those of FILE's .npz
    model FILE          all on the GPU: loading, memory, prefill, decoding
    split FILE          experts beyond --vram: the same, hit rates, and where the time goes
    context FILE        32k and 128k tokens, caches of f16 and q8_0
    peer                mlx-lm with V2-Lite's geometry and random weights
    llama FILE          llama-bench and `localds bench` with the same GPU memory, in turns
    products            products of matrices, beside MLX's own forms
    profile FILE        the GPU's kernels of some steps (needs torch)
    make-parity FOLDER  write tiny models for `parity` (needs the tests' packages)

--cpu makes MLX's CPU device stand in for the GPU and --small makes shapes small: to see that the
script works. Times are medians. Figures also go to --json, one a line. `bench/gpu_lease.md` says
how to run it on a machine with an NVIDIA GPU and no network.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from gpu_report import Report

COMMANDS = (
    *("all", "facts", "kernels", "parity", "model", "split", "context", "peer", "llama"),
    *("products", "profile", "make-parity"),
)


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        sys.exit(__doc__)
    module = import_module(f"gpu_{command.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"gpu.py {command}", description=module.__doc__.splitlines()[0]
    )
    parser.add_argument("--cpu", action="store_true", help="MLX's CPU device stands in")
    parser.add_argument("--small", action="store_true", help="small shapes, few tokens")
    parser.add_argument("--json", type=Path, help="add figures to this file, one a line")
    module.add_options(parser)
    arguments = parser.parse_args(sys.argv[2:])
    if arguments.cpu:
        os.environ["LOCALDS_GPU"] = "cpu"
    report = Report(command, arguments.json)
    module.run(arguments, report)
    if report.failed:
        sys.exit(f"{command}: not all is as it should be")


if __name__ == "__main__":
    main()

"""Train the guide on a CPU with python -m training.train OUT.

Writes OUT/checkpoint (a Hugging Face checkpoint), OUT/loss.csv and OUT/loss.svg. Every minute the
whole state goes to OUT/state.pt; the same command then goes on from there and ends with the same
weights as an unbroken run. Needs torch, tokenizers, safetensors and matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import math
import sys
import time
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch.func import functional_call

from training.checkpoint import write_checkpoint
from training.dialogues import Dialogues, Encoder, batch
from training.model import Guide, Shape
from training.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
_LIBC = ctypes.CDLL(None)

# How long conversations are, in tokens, with the share of the steps, in this order. In 40 tokens
# there is one question and nothing else to look at, so that questions are understood sooner; then
# conversations grow.
CURRICULUM = (
    (0.2517, 128),
    (0.4683, 40),
    (0.14, 128),
    (0.06, 256),
    (0.04, 512),
    (0.02, 1024),
    (0.02, 2048),
)
STEP_TOKENS = 4096
# Of the routing bias: faster than DeepSeek-V3's 1e-3, for there are thousands of steps instead of
# hundreds of thousands, and falling with the learning rate. The loss's factor is V3's.
BALANCE_SPEED = 1e-2
BALANCE_LOSS = 1e-4
CLIP = 1.0
SAVE_SECONDS = 60.0
REPORT_STEPS = 40
CHECK_STEPS = 400


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    out: Path
    steps: int
    rate: float
    warmup: int
    seed: int


def main() -> None:
    """Train, or go on with training, and write the checkpoint."""
    options = _parse()
    _keep_memory()
    options.out.mkdir(parents=True, exist_ok=True)
    dialogues = Dialogues()
    tokenizer = _tokenizer(dialogues, options)
    run = Run(options, dialogues, tokenizer)
    run.resume()
    run.train()
    write_checkpoint(options.out / "checkpoint", run.model, tokenizer)
    from training.plots import draw_losses

    draw_losses(options.out / "loss.csv", options.out / "loss.svg")
    print(f"{options.out / 'checkpoint'}: trained in {run.seconds / 60:.0f} minutes")


class Run:
    """Weights, optimizer and history of one training."""

    def __init__(self, options: Options, dialogues: Dialogues, tokenizer: Tokenizer) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.dialogues = dialogues
        self.encoder = Encoder(tokenizer)
        self.model = Guide(Shape(vocab_size=tokenizer.get_vocab_size()))
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=options.rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0
        self.losses: list[tuple[int, int, float, float | None]] = []
        self.recent: list[float] = []  # losses since the last report

    def train(self) -> None:
        """Take the steps that are left."""
        started = saved = time.monotonic()
        before = self.seconds
        for step, length in self._schedule():
            self.recent.append(self._advance(step, length))
            self.step = step + 1
            self.seconds = before + time.monotonic() - started
            if self.step % REPORT_STEPS == 0 or self.step == self.options.steps:
                check = self.check(length) if self.step % CHECK_STEPS == 0 else None
                mean = sum(self.recent) / len(self.recent)
                self.losses.append((self.step, length, mean, check))
                self.recent.clear()
                self._report()
                _return_memory()
            if time.monotonic() - saved > SAVE_SECONDS or self.step == self.options.steps:
                self.save()
                saved = time.monotonic()

    def check(self, length: int) -> float:
        """The loss on phrasings that are kept out of training."""
        inputs, targets = batch(
            self.dialogues, self.encoder, "held out", 4096 // length, length, held_out=True
        )
        with torch.no_grad():
            return float(self.model(torch.from_numpy(inputs), torch.from_numpy(targets)))

    def save(self) -> None:
        """Write the state; a run that is killed meanwhile keeps the last one."""
        path = self.options.out / "state.pt"
        part = path.with_suffix(".part")
        torch.save(self._state(), part)
        part.replace(path)
        with (self.options.out / "loss.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "length", "loss", "held_out"))
            writer.writerows((s, n, f"{a:.4f}", b and f"{b:.4f}") for s, n, a, b in self.losses)

    def resume(self) -> None:
        """Take up a saved state, where there is one; it must be of the same options."""
        path = self.options.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["settings"] != self._settings():
            sys.exit(
                f"{path} is of another training ({state['settings']}); "
                "give the same options, or another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = [tuple(row) for row in state["losses"]]
        self.recent = state["recent"]
        print(f"going on after step {self.step}")

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "recent": self.recent,
        }

    def _settings(self) -> str:
        options = self.options
        return f"seed {options.seed}, {options.steps} steps, rate {options.rate}"

    def _schedule(self) -> Iterator[tuple[int, int]]:
        """The steps to come, and how long their conversations are."""
        ends = list(accumulate(share for share, _ in CURRICULUM))
        for step in range(self.step, self.options.steps):
            stage = bisect_right(ends[:-1], step / self.options.steps)
            yield step, CURRICULUM[stage][1]

    def _advance(self, step: int, length: int) -> float:
        """One step of the optimizer, computed in bfloat16; returns the loss."""
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = batch(
            self.dialogues,
            self.encoder,
            f"{self.options.seed}/{step}",
            STEP_TOKENS // length,
            length,
        )
        half = {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}
        arguments = (torch.from_numpy(inputs), torch.from_numpy(targets))
        loss = functional_call(self.model, half, arguments)
        mixtures = self.model.mixtures()
        (loss + BALANCE_LOSS * sum(m.balance_loss for m in mixtures)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for mixture in mixtures:
            mixture.gate.rebalance(BALANCE_SPEED * rate / self.options.rate)
        return float(loss.detach())

    def _rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a twentieth."""
        options = self.options
        if step < options.warmup:
            return options.rate * (step + 1) / options.warmup
        done = (step - options.warmup) / max(options.steps - options.warmup, 1)
        return options.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def _report(self) -> None:
        step, length, loss, check = self.losses[-1]
        left = self.seconds / step * (self.options.steps - step)
        loads = [mixture.gate.load.float() for mixture in self.model.mixtures()]
        least = min(float(load.min() / load.mean()) for load in loads)
        most = max(float(load.max() / load.mean()) for load in loads)
        held_out = f", held out {check:.3f}" if check is not None else ""
        print(
            f"step {step}/{self.options.steps}, {length} tokens: loss {loss:.3f}{held_out}, "
            f"expert load {least:.2f} to {most:.2f} of fair, "
            f"{step * STEP_TOKENS / self.seconds:.0f} tokens/s, {left / 60:.0f} min left",
            flush=True,
        )


def _parse() -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description="Train the guide."
    )
    parser.add_argument("out", type=Path, help="folder for checkpoint, state and loss curve")
    parser.add_argument("--steps", type=int, default=4800, help=f"of {STEP_TOKENS} tokens")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=60, help="steps to reach it")
    parser.add_argument("--seed", type=int, default=1)
    return Options(**vars(parser.parse_args()))


def _tokenizer(dialogues: Dialogues, options: Options) -> Tokenizer:
    """The tokenizer of an earlier start, or a new one."""
    path = options.out / "tokenizer.json"
    if not path.exists():
        made = train_tokenizer(dialogues, ROOT, Shape().vocab_size, options.seed)
        made.save(str(path))
    return Tokenizer.from_file(str(path))


def _keep_memory() -> None:
    """Let glibc keep what it frees: mapping large tensors anew costs a third of a step."""
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(m_mmap_threshold, 1 << 25)
        _LIBC.mallopt(m_trim_threshold, 2**31 - 1)
        _LIBC.mallopt(m_top_pad, 1 << 28)


def _return_memory() -> None:
    """Give back what is free between tensors; now and then, or the process grows by gigabytes."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


if __name__ == "__main__":
    main()

"""What the expert store costs where everything fits, and that it changes no bit of the output.

usage: store_cost.py MODEL.gguf [--tokens 32] [--rounds 5] [--budgets 5GiB 4GiB 3GiB]

Decodes with the file mapped as a whole and with all experts in the store's pool, in turns, and
prints the median of the ratios; then compares logits of `--bits` tokens at each budget. Needs
memory for the model twice.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import localds
from localds import models
from localds.gguf import GGUFFile
from localds.memory.placement import place
from localds.memory.plan import make_plan
from localds.model import Model

if TYPE_CHECKING:
    from localds.session import Session

CONTEXT = 2048


def load_pooled(path: Path) -> Model:
    """All experts in the pool."""
    gguf = GGUFFile.open(path)
    geometry = models.read_geometry(gguf)
    plan = make_plan(gguf, geometry, CONTEXT)
    model = Model(gguf, place(gguf, geometry, plan, None, pooled=True))
    if model.experts:
        model.experts.wait_warm()
    return model


def ids(model: Model, count: int) -> list[int]:
    return [(7919 * i + 11) % model.geometry.vocabulary for i in range(count)]


def speed(session: Session, tokens: list[int]) -> float:
    session.truncate(0)
    session.evaluate(tokens[:8])
    started = time.perf_counter()
    for token in tokens:
        session.evaluate([token])
    return len(tokens) / (time.perf_counter() - started)


def compare_speed(path: Path, count: int, rounds: int) -> None:
    with localds.load(path, ram="64TiB") as resident, load_pooled(path) as pooled:
        sessions = resident.session(CONTEXT), pooled.session(CONTEXT)
        tokens = ids(resident, count)
        for session in sessions:  # faults the weights in
            session.evaluate(tokens)
        results = [[speed(session, tokens) for session in sessions] for _ in range(rounds)]
        figures = pooled.experts.take_figures() if pooled.experts else None
    mapped, store = (statistics.median(column) for column in zip(*results, strict=True))
    ratio = statistics.median(s / m for m, s in results)
    print(f"mapped {mapped:.2f} tokens/s, all in the pool {store:.2f}, ratio {ratio:.3f}")
    if figures:
        print(f"hits {figures.hits} of {figures.uses}")


def digest(model: Model, count: int) -> str:
    """Of the logits' bits: half a prompt, half one by one."""
    session, tokens = model.session(CONTEXT), ids(model, count)
    half = count // 2
    parts = [session.evaluate(tokens[:half], all_logits=True)]
    parts += [session.evaluate([token]) for token in tokens[half:]]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def compare_bits(path: Path, budgets: list[str], count: int) -> None:
    digests = {}
    for budget in ["64TiB", *budgets]:
        with localds.load(path, ram=budget, context=CONTEXT) as model:
            digests[budget] = digest(model, count)
            slots = "mapped" if model.placement.resident else f"{model.placement.slots} slots"
            print(f"{budget:>8} {slots:>10}: logits of {count} tokens {digests[budget][:16]}")
        del model
    print("identical" if len(set(digests.values())) == 1 else "DIFFERENT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budgets", nargs="*", default=["5GiB", "4GiB", "3GiB"])
    parser.add_argument("--bits", type=int, default=256)
    args = parser.parse_args()
    compare_speed(args.model, args.tokens, args.rounds)
    compare_bits(args.model, args.budgets, args.bits)


if __name__ == "__main__":
    main()

"""How often experts would be in memory under several policies, over recorded choices.

usage: replay_traces.py TRACE.npz...    (files of `localds trace`)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from localds.routing_trace import load_trace

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from expert_simulator import Engine, Lfu, Lru, Optimum, calls, replay

SHARES = (0.1, 0.2, 0.4, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    for path in parser.parse_args().traces:
        trace = load_trace(path)
        sequence = list(calls(trace))
        total = trace.n_layers * trace.n_experts
        top_k = trace.ids.shape[1]
        print(f"{path}: {total} experts, {len(trace.ids) // trace.n_layers} tokens")
        print(f"{'in memory':>10} {'LRU':>7} {'LFU':>7} {'engine':>7} {'optimum':>8}")
        for share in SHARES:
            slots = max(int(total * share), 2 * top_k)
            rates = [
                replay(policy, sequence)
                for policy in (
                    Lru(slots),
                    Lfu(slots),
                    Engine.of(slots, top_k),
                    Optimum(slots, sequence),
                )
            ]
            cells = " ".join(f"{100 * rate:>6.1f}%" for rate in rates)
            print(f"{100 * share:>9.0f}% {cells}", flush=True)


if __name__ == "__main__":
    main()

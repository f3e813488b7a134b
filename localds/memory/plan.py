"""What a model takes in memory, before it is loaded, and what the machine has to give."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localds.memory.latents import row_bytes
from localds.units import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localds.gguf import GGUFFile
    from localds.models.geometry import Geometry

# In the order in which a token meets them. The first pattern that matches a tensor's name counts.
PARTS = {
    "embedding": r"token_embd\.",
    "attention": r"blk\.\d+\.attn_",
    "router": r"blk\.\d+\.(ffn_gate_inp|exp_probs_b)\.",
    "routed experts": r"blk\.\d+\.ffn_\w+_exps\.",
    "shared experts": r"blk\.\d+\.ffn_\w+_shexp\.",
    "dense feed-forward": r"blk\.\d+\.ffn_",
    "output": r"output",
}
OTHER = "other"

DEFAULT_CHUNK = 1024
"""Tokens of a prompt computed at once: with more of them, an expert's weights serve more tokens."""

ALLOWANCE = 1_000_000_000
"""Bytes beside the weights: 8192 tokens of latent cache (0.25 to 0.6 GB) and the runtime."""


class BudgetError(ValueError):
    """A model does not fit in the memory that it was given."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes that a model takes when every weight has been used once.

    `parts` are the weights by part; `runtime` is everything that is neither weights nor cache:
    the interpreter, the vocabulary and the kernels' scratch memory.
    """

    parts: dict[str, int]
    context: int
    cache_per_token: int
    runtime: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(self.parts.values())

    @property
    def cache(self) -> int:
        """Bytes of the latent cache when the context is full."""
        return self.context * self.cache_per_token

    @property
    def total(self) -> int:
        """Resident bytes with a full context."""
        return self.weights + self.cache + self.runtime


def make_plan(gguf: GGUFFile, geometry: Geometry, context: int, cache_type: str = "f16") -> Plan:
    """Plan for `context` tokens, at most what the model was made for."""
    return Plan(
        parts=bytes_by_part(gguf, geometry.layers),
        context=min(context, geometry.context_length),
        cache_per_token=geometry.layers * row_bytes(cache_type, geometry.cache_width),
        runtime=_runtime_bytes(geometry),
    )


def require_budget(plan: Plan, ram: int | str) -> None:
    """Raise `BudgetError` where `plan` takes more than `ram` (bytes, or a size like "12GiB")."""
    budget = parse_size(ram) if isinstance(ram, str) else ram
    if plan.total <= budget:
        return
    fixed = plan.weights + plan.runtime
    if fixed + plan.cache_per_token <= budget:
        tokens = (budget - fixed) // plan.cache_per_token
        remedy = f"a context of {tokens} tokens would fit"
    else:
        remedy = f"the weights alone need {format_size(fixed)}; use a smaller quantization"
    raise BudgetError(
        f"the model needs {format_size(plan.total)} with a context of {plan.context} tokens, "
        f"the budget is {format_size(budget)}: {remedy}"
    )


def bytes_by_part(gguf: GGUFFile, layers: int) -> dict[str, int]:
    """Bytes of the tensors that are used, by part in the order of `PARTS`; empty ones left out.

    Layers from `layers` on, which predict more than one token at a time, are never loaded.
    """
    patterns = {part: re.compile(pattern) for part, pattern in PARTS.items()}
    count: Counter[str] = Counter()
    for name, tensor in gguf.tensors.items():
        block = re.match(r"blk\.(\d+)\.", name)
        if block and int(block[1]) >= layers:
            continue
        part = next((part for part, pattern in patterns.items() if pattern.match(name)), OTHER)
        count[part] += tensor.nbytes
    return {part: count[part] for part in (*PARTS, OTHER) if count[part]}


def estimate(file_bytes: int) -> int:
    """Bytes of memory that a model wants, by the size of its file alone.

    Good enough to choose what to download; `make_plan` knows exactly once the file is there.
    """
    return file_bytes + ALLOWANCE


def total_memory() -> int | None:
    """Bytes of RAM that this process could have: the machine's, or a cgroup's limit below it."""
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    limits = (_read_limit(limit) for limit, _ in _cgroup_files())
    return min([installed, *(limit for limit in limits if limit is not None)])


def available_memory() -> int | None:
    """Bytes that this process may still take: free RAM and every cgroup limit above it.

    None where the system does not say (macOS).
    """
    limits = [limit for limit in (_free_ram(), *_cgroup_room()) if limit is not None]
    return min(limits, default=None)


def _runtime_bytes(geometry: Geometry) -> int:
    """Measured: interpreter and libraries, 550 bytes per word of the vocabulary, scratch memory.

    Scratch is largest in attention over a prompt: queries in both forms, contexts and values of
    all heads in float32, for a chunk of a prompt, and half as much again for what is quantized.
    """
    per_token = 2 * geometry.heads * geometry.cache_width + geometry.expanded_width
    return 50_000_000 + 550 * geometry.vocabulary + DEFAULT_CHUNK * 4 * per_token * 3 // 2


def _free_ram() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _cgroup_room() -> list[int]:
    """Room left under the memory limits of this process's cgroups, ancestors included."""
    rooms = (_room(limit, usage) for limit, usage in _cgroup_files())
    return [room for room in rooms if room is not None]


def _cgroup_files() -> Iterator[tuple[Path, Path]]:
    """The files with limit and usage of this process's cgroups, ancestors included."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # cgroup v2
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for level in (folder, *folder.parents):
            if level != root and root not in level.parents:
                break
            yield level / limit, level / usage


def _room(limit: Path, usage: Path) -> int | None:
    allowed = _read_limit(limit)
    try:
        return None if allowed is None else max(allowed - int(usage.read_text()), 0)
    except (OSError, ValueError):
        return None


def _read_limit(limit: Path) -> int | None:
    """A cgroup's limit in bytes; None where it has none, which is written "max"."""
    try:
        return int(limit.read_text())
    except (OSError, ValueError):
        return None

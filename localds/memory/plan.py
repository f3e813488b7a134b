"""What a model takes in memory, before it is loaded."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.memory.latents import row_bytes

if TYPE_CHECKING:
    from localds.gguf import GGUFFile
    from localds.models.geometry import Geometry

ROUTED = "routed experts"
# In the order in which a token meets them. The first pattern that matches a tensor's name counts.
PARTS = {
    "embedding": r"token_embd\.",
    "attention": r"blk\.\d+\.attn_",
    "router": r"blk\.\d+\.(ffn_gate_inp|exp_probs_b)\.",
    ROUTED: r"blk\.\d+\.ffn_\w+_exps\.",
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
    """A model does not fit in the memory that it was given, however little of it is kept there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes that a model takes when every weight has been used once.

    `parts` are the weights by part; `runtime` is everything that is neither weights nor cache:
    the interpreter, the vocabulary and the kernels' scratch memory. The layers `on_device`, numbers
    of blocks, have all their routed experts on a GPU, and these are not among the parts.
    """

    parts: dict[str, int]
    context: int
    cache_per_token: int
    runtime: int
    on_device: frozenset[int] = frozenset()

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(self.parts.values())

    @property
    def trunk(self) -> int:
        """Bytes of all weights but the routed experts."""
        return self.weights - self.parts.get(ROUTED, 0)

    @property
    def cache(self) -> int:
        """Bytes of the latent cache when the context is full."""
        return self.context * self.cache_per_token

    @property
    def total(self) -> int:
        """Resident bytes with a full context."""
        return self.weights + self.cache + self.runtime


def make_plan(
    gguf: GGUFFile,
    geometry: Geometry,
    context: int,
    cache_type: str = "f16",
    chunk: int = DEFAULT_CHUNK,
) -> Plan:
    """Plan for `context` tokens, at most what the model was made for, and `chunk` at once."""
    return Plan(
        parts=bytes_by_part(gguf, geometry.layers),
        context=min(context, geometry.context_length),
        cache_per_token=geometry.layers * row_bytes(cache_type, geometry.cache_width),
        runtime=_runtime_bytes(geometry, chunk),
    )


def is_routed(name: str) -> bool:
    """Whether a tensor holds routed experts."""
    return re.match(PARTS[ROUTED], name) is not None


def is_trunk(name: str, layers: int) -> bool:
    """Whether a tensor holds no routed experts and is used in a model of so many layers."""
    block = re.match(r"blk\.(\d+)\.", name)
    return not is_routed(name) and (block is None or int(block[1]) < layers)


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


def _runtime_bytes(geometry: Geometry, chunk: int) -> int:
    """Measured: interpreter and libraries, 550 bytes per word of the vocabulary, scratch memory.

    Scratch is largest in attention over a prompt: queries in both forms, contexts and values of
    all heads in float32, for a chunk of a prompt, and half as much again for what is quantized.
    """
    per_token = 2 * geometry.heads * geometry.cache_width + geometry.expanded_width
    return 50_000_000 + 550 * geometry.vocabulary + chunk * 4 * per_token * 3 // 2

"""What training takes on a device, in bytes: counted from the tensors of a file, before it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.adapters import Base, targets_of
from localds.finetune.limits import BLOCK, KEPT_BYTES, LOGIT_BYTES, SCORE_BYTES, SLICE_BYTES, SMALL
from localds.memory.gpu_sizes import device_sizes
from localds.memory.placement import routed_tensors

if TYPE_CHECKING:
    from localds.finetune.config import AdapterConfig
    from localds.gguf import GGUFFile
    from localds.memory.gpu_sizes import DeviceBytes, DeviceSizes
    from localds.models.geometry import Geometry
    from localds.ops.mlx_device import Gpu

FLOAT = 4
_MIB = 1 << 20

# How often a block of scores, of logits, and a matrix that is written out are there at once.
_SCORE_COPIES = 4
_LOGIT_COPIES = 4
_SLICE_COPIES = 2

# What is not counted one by one: terms of adapters, router scores, and what an allocator rounds up.
_SPARE = 1.2
_SPARE_OF_DORA = 0.3  # the scaled outputs
_SPARE_OF_DROPOUT = 0.3  # the inputs of which some are dropped

STAGING_BYTES = 512 * _MIB
"""What experts on their way to the device may take, unless one alone takes more."""
_EXPERT_MATRICES = 3

_BLOCK_BYTES = 2 * (BLOCK + FLOAT)  # both moments, each with the largest value of its block
_UPDATE_COPIES = 8  # of the largest tensor, while the optimizer changes it


@dataclass(frozen=True, slots=True)
class Micro:
    """A micro-batch: `rows` of `length` positions."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Positions in all."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Widths:
    """Values that a layer has of a token, by what they are."""

    hidden: int
    latents: int
    queries: int
    values: int
    expanded: int
    dense: int
    expert: int
    shared: int
    top_k: int

    @property
    def attention(self) -> int:
        """Kept by attention for its gradient."""
        return (
            3 * self.hidden + 2 * self.latents + 5 * self.queries + self.expanded + 3 * self.values
        )

    @property
    def attention_gradient(self) -> int:
        """There besides while its gradient is computed, without scores."""
        return 3 * self.hidden + self.latents + 4 * self.queries + self.expanded + 4 * self.values

    @property
    def _pairs(self) -> int:
        return self.top_k * (self.hidden + self.expert)

    def dense_layer(self, tokens: int) -> int:
        """Kept by a dense feed-forward layer of so many tokens."""
        return 2 * tokens * self.hidden + _kept(tokens, self.dense)

    def mixture(self, tokens: int, *, resident: bool) -> int:
        """Kept by a layer with experts. Those that are brought are computed for all tokens."""
        inputs = tokens * (2 * self.hidden + self.top_k)
        pairs = _kept(tokens, self._pairs) if resident else 3 * tokens * self._pairs
        return inputs + pairs + _kept(tokens, self.shared)

    def forward(self, tokens: int, *, resident: bool) -> int:
        """Kept by the larger kind of feed-forward layer."""
        return max(self.dense_layer(tokens), self.mixture(tokens, resident=resident))

    def forward_gradient(self, tokens: int, *, resident: bool) -> int:
        """There besides while a feed-forward layer's gradient is computed."""
        dense = 5 * _at_once(tokens, self.dense) * self.dense + _again(tokens, self.dense)
        at_once = _at_once(tokens, self._pairs) if resident else tokens
        pairs = at_once * self.top_k * (4 * self.hidden + 5 * self.expert)
        if resident:
            pairs += _again(tokens, self._pairs)
        shared = 5 * _at_once(tokens, self.shared) * self.shared + _again(tokens, self.shared)
        return 2 * tokens * self.hidden + max(dense, pairs + shared)


# Of a token, layers keep three values for each of their widths.


def _at_once(tokens: int, width: int) -> int:
    """How many of the tokens a feed-forward layer computes at once: `slices.token_slices`."""
    most = max(KEPT_BYTES // (3 * FLOAT * max(width, 1)), 1)
    return math.ceil(tokens / math.ceil(tokens / most))


def _kept(tokens: int, width: int) -> int:
    """Values that are kept; none where the gradient computes slices again."""
    return 3 * width * tokens if _at_once(tokens, width) == tokens else 0


def _again(tokens: int, width: int) -> int:
    """Values that are computed again for the gradient of a slice."""
    return 3 * width * _at_once(tokens, width) - _kept(tokens, width)


@dataclass(frozen=True, slots=True)
class TrainSizes:
    """What a model and its adapters take. `leaves` are the values in each trained tensor."""

    device: DeviceSizes
    widths: Widths
    layers: int
    dense_layers: int
    heads: int
    vocabulary: int
    leaves: tuple[int, ...]
    spare: float
    """What activations are multiplied by, for what is not counted one by one."""
    output_bytes: int
    """The output matrix when it is written out, 0 where the device multiplies it as it lies."""

    @property
    def adapters(self) -> int:
        """Bytes of what is trained."""
        return FLOAT * sum(self.leaves)

    def gradients(self, accumulation: int) -> int:
        """Bytes of gradients: of one micro-batch, and where there are several, their sum."""
        return self.adapters * (1 if accumulation == 1 else 2)

    def moments(self, optimizer: str) -> int:
        """Bytes of the optimizer's states."""
        if optimizer == "adamw":
            return 2 * self.adapters
        return sum(
            2 * FLOAT * size if size < SMALL else math.ceil(size / BLOCK) * _BLOCK_BYTES
            for size in self.leaves
        )

    @property
    def staged(self) -> int:
        """Bytes of an expert on its way: it, the next one, and its values where it is written."""
        largest = max(self.device.expert_bytes, default=0)
        return 2 * largest + _EXPERT_MATRICES * self.device.expert_written

    @property
    def staging(self) -> int:
        """Bytes for the experts that are brought to the device at a time."""
        if not self.staged:
            return 0
        return self.staged * min(self.device.experts, max(STAGING_BYTES // self.staged, 1))

    def kept(self, micro: Micro, *, checkpointing: bool, resident: bool) -> int:
        """Bytes kept of all layers until their gradients are computed."""
        w = self.widths
        n, moes = micro.tokens, self.layers - self.dense_layers
        values = n * (self.layers + 2) * w.hidden
        if not resident and not checkpointing:
            values += n * moes * (w.hidden + 2 * w.top_k)
        elif not checkpointing:
            values += n * self.layers * w.attention
            values += self.dense_layers * w.dense_layer(n) + moes * w.mixture(n, resident=True)
        return int(self.spare * FLOAT * values)

    def layer(self, micro: Micro, *, checkpointing: bool, resident: bool) -> int:
        """Bytes that the gradient of one layer takes at most."""
        w = self.widths
        again = checkpointing or not resident
        tokens = micro.tokens
        before = tokens * w.attention if again else 0
        forward = before + (w.forward(tokens, resident=resident) if again else 0)
        forward += w.forward_gradient(tokens, resident=resident)
        attention = before + tokens * w.attention_gradient
        scores = _SCORE_COPIES * min(
            SCORE_BYTES, FLOAT * micro.rows * self.heads * micro.length * micro.length
        )
        n = self.spare * FLOAT
        return int(max(n * forward + self._written(resident=resident), n * attention + scores))

    def head(self, micro: Micro) -> int:
        """Bytes that logits and their gradient take at most."""
        logits = min(LOGIT_BYTES, FLOAT * micro.tokens * self.vocabulary)
        written = _SLICE_COPIES * min(SLICE_BYTES, self.output_bytes)
        return _LOGIT_COPIES * logits + written + 5 * FLOAT * micro.tokens * self.widths.hidden

    def update(self) -> int:
        """Bytes that the optimizer takes for one tensor, beside its states."""
        return _UPDATE_COPIES * FLOAT * max(self.leaves, default=0)

    def _written(self, *, resident: bool) -> int:
        """Matrices that are written out as floats: slices of one, or a stack of experts."""
        device = self.device
        trunk = min(SLICE_BYTES, device.trunk_written)
        stack = device.experts * device.expert_written if resident else 0
        return _SLICE_COPIES * max(trunk, stack)


def train_sizes(
    gguf: GGUFFile,
    geometry: Geometry,
    gpu: Gpu,
    device_bytes: DeviceBytes,
    config: AdapterConfig,
) -> TrainSizes:
    """Sizes of training on `gpu`; see `device_sizes`. Raises `ValueError` for absent targets."""
    leaves = _leaves(gguf, geometry, config)
    if not leaves:
        raise ValueError(
            f"targets: {geometry.architecture} has none of {', '.join(config.targets)}; "
            "choose others"
        )
    device = device_sizes(gguf, geometry, gpu, device_bytes)
    output = gguf.tensors.get("output.weight", gguf.tensors["token_embd.weight"])
    return TrainSizes(
        device=device,
        widths=_widths(gguf, geometry),
        layers=geometry.layers,
        dense_layers=geometry.layers - geometry.moe_layers,
        heads=geometry.heads,
        vocabulary=geometry.vocabulary,
        leaves=leaves,
        spare=_spare(config),
        output_bytes=FLOAT * output.n_elements,
    )


def _spare(config: AdapterConfig) -> float:
    dora = _SPARE_OF_DORA if config.method == "dora" else 0
    return _SPARE + dora + (_SPARE_OF_DROPOUT if config.dropout else 0)


def _leaves(gguf: GGUFFile, geometry: Geometry, config: AdapterConfig) -> tuple[int, ...]:
    """The values in each of the tensors a, b (and m) of every adapter."""
    shapes = {name: tensor.shape[::-1] for name, tensor in gguf.tensors.items()}
    base = Base(
        geometry.architecture,
        geometry.architecture,
        geometry.layers,
        geometry.heads,
        geometry.heads,
        shapes,
    )
    found: list[int] = []
    for name, matrix in base.matrices.items():
        if targets_of(geometry.architecture, [name])[0] in config.targets:
            count = matrix.experts or 1
            found += [count * config.rank * matrix.columns, count * config.rank * matrix.rows]
            if config.method == "dora":
                found.append(count * matrix.rows)
    return tuple(found)


def _widths(gguf: GGUFFile, geometry: Geometry) -> Widths:
    tensors = gguf.tensors

    def size(suffix: str, axis: int) -> int:
        """The largest of the tensors with such a name in any layer, 0 for none."""
        names = (f"blk.{layer}.{suffix}.weight" for layer in range(geometry.layers))
        return max((tensors[name].shape[axis] for name in names if name in tensors), default=0)

    experts = [t for layer in routed_tensors(gguf, geometry).values() for t in layer]
    return Widths(
        hidden=geometry.hidden,
        latents=geometry.cache_width + size("attn_q_a", 1),
        queries=size("attn_q_b", 1) or size("attn_q", 1),
        values=size("attn_output", 0),
        expanded=geometry.expanded_width,
        dense=size("ffn_down", 0),
        expert=max((t.shape[0] for t in experts if ".ffn_down_exps." in t.name), default=0),
        shared=size("ffn_down_shexp", 0),
        top_k=geometry.experts_used if experts else 0,
    )

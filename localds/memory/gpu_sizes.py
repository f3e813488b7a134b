"""What a model takes on a GPU, in bytes: weights, experts, and what a pass takes for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localds.gguf import GGMLType
from localds.memory.latents import attention_scratch
from localds.memory.placement import routed_tensors
from localds.memory.plan import is_trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from localds.gguf import GGUFFile, Tensor
    from localds.models.geometry import Geometry
    from localds.ops.mlx_device import Gpu

    DeviceBytes = Callable[[GGMLType, int], int]

WRITTEN_BYTES = 768 << 20
"""What matrices take at most that our kernels write out as floats, to multiply many rows.

Gate and up of a layer are multiplied at once, so that each may take half of it: enough for all
experts of V2-Lite, which are then written without waiting.
"""

# Kernels, and what the driver keeps for a process.
_RUNTIME = {"cuda": 300_000_000, "metal": 100_000_000, "cpu": 50_000_000}

_PIECE_BYTES = 128 << 20
_PIECES = 2  # one is computed while the next arrives

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_FLOAT = 4
_PAIR_OUTPUTS = 3  # as they come, in the order of the tokens, and weighted
_MIDDLES = 3  # gate, up, and their product


@dataclass(frozen=True, slots=True)
class Pass:
    """What is computed at once: `chunk` tokens of a prompt, over a cache of `cache_type`."""

    chunk: int
    cache_type: str = "f16"


@dataclass(frozen=True, slots=True)
class DeviceSizes:
    """Sizes in bytes. `blocks` are the numbers of the layers that have `experts` experts each.

    `trunk` is everything but these, `active_trunk` what a token reads of it, and `expert_bytes` one
    expert of each such layer; all as they lie on the device. `expert_file_bytes` is an expert as it
    lies in the file, and `multiply_adds` what it computes for a token. `trunk_written` is the
    largest matrix of the trunk as products of many tokens write it out, `expert_written` that of an
    expert; `most_written` is what such matrices take at most at once, None where some are always
    written as a whole. `token_floats` are the values that a feed-forward layer keeps for a token,
    `attention_floats` those of attention beside `attention_scratch`.
    """

    trunk: int
    active_trunk: int
    experts: int
    blocks: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    expert_file_bytes: tuple[int, ...]
    multiply_adds: tuple[int, ...]
    trunk_written: int
    expert_written: int
    most_written: int | None
    token_floats: int
    attention_floats: int
    runtime: int

    @property
    def piece(self) -> int:
        """The largest experts that are brought to the device at a time."""
        largest = max(self.expert_bytes, default=0)
        return min(self.experts, max(_PIECE_BYTES // largest, 1)) if largest else 0

    @property
    def staging(self) -> int:
        """Bytes of the pieces on their way to the device."""
        return _PIECES * self.piece * max(self.expert_bytes, default=0)

    @property
    def most_staged(self) -> int:
        """Experts of a piece in the layer that has the smallest ones."""
        room = self.staging // _PIECES
        return min(self.experts, room // min(self.expert_bytes)) if room else 0


def device_sizes(
    gguf: GGUFFile, geometry: Geometry, gpu: Gpu, device_bytes: DeviceBytes
) -> DeviceSizes:
    """Sizes of a model on `gpu`, where bytes of a type in the file become `device_bytes(...)`."""
    routed = routed_tensors(gguf, geometry)
    trunk = [t for t in gguf.tensors.values() if is_trunk(t.name, geometry.layers)]
    experts = [t for layer in routed.values() for t in layer]
    width = max((t.shape[0] for t in experts if ".ffn_down_exps." in t.name), default=0)
    dense = max((t.shape[0] for t in trunk if t.name.endswith("ffn_down.weight")), default=0)
    pairs = geometry.experts_used * (_PAIR_OUTPUTS * geometry.hidden + _MIDDLES * width)

    tied = _OUTPUT not in gguf.tensors
    active = [t for t in trunk if tied or t.name != _EMBEDDING]

    def written(tensor: Tensor) -> int:
        return _written(gpu, tensor, device_bytes)

    sliced = all(_has_kernels(gpu, t.type) for t in [*active, *experts] if written(t))
    return DeviceSizes(
        trunk=sum(_trunk_bytes(tensor, device_bytes) for tensor in trunk),
        active_trunk=sum(_trunk_bytes(tensor, device_bytes) for tensor in active),
        experts=geometry.experts if routed else 0,
        blocks=tuple(routed),
        expert_bytes=_of_experts(routed.values(), lambda t: device_bytes(t.type, t.nbytes)),
        expert_file_bytes=_of_experts(routed.values(), lambda t: t.nbytes),
        multiply_adds=_of_experts(routed.values(), lambda t: t.n_elements),
        trunk_written=max(map(written, active), default=0),
        expert_written=max((written(t) // t.shape[-1] for t in experts), default=0),
        most_written=WRITTEN_BYTES if sliced else None,
        token_floats=2 * geometry.hidden + max(pairs, _MIDDLES * dense),
        attention_floats=2 * geometry.hidden + geometry.expanded_width,
        runtime=_RUNTIME[gpu.kind],
    )


def scratch_bytes(
    sizes: DeviceSizes, geometry: Geometry, run: Pass, context: int, stack: int
) -> int:
    """What a pass takes at most with a cache of `context` tokens, `stack` experts in one stack.

    One layer computes at a time, so that the larger of attention and feed-forward counts; two
    matrices of either are written out, or slices of them. Of a prompt only the last token has
    logits.
    """
    chunk = min(run.chunk, context)
    scores = attention_scratch(geometry.heads, geometry.cache_width, chunk, context, run.cache_type)
    attention = scores + chunk * sizes.attention_floats * _FLOAT
    feed_forward = chunk * sizes.token_floats * _FLOAT
    largest = max(sizes.trunk_written, stack * sizes.expert_written)
    written = 2 * largest if sizes.most_written is None else min(2 * largest, sizes.most_written)
    logits = geometry.vocabulary * _FLOAT
    return max(attention, feed_forward) + written + logits + sizes.runtime


def _trunk_bytes(tensor: Tensor, device_bytes: DeviceBytes) -> int:
    nbytes = device_bytes(tensor.type, tensor.nbytes)
    if tensor.name.endswith("attn_kv_b.weight"):
        # The keys' half is kept transposed, in float16, which no block type is.
        return max(nbytes, 2 * tensor.n_elements)
    return nbytes


def _written(gpu: Gpu, tensor: Tensor, device_bytes: DeviceBytes) -> int:
    """Bytes of a matrix that is written out before it is multiplied, 0 if it is not.

    Our kernels write blocks as float16, but for few rows: the output has to multiply the last
    token's alone. MLX's own operations multiply what is in a form of theirs as it lies, and the
    rest in float32.
    """
    kind = tensor.type
    if len(tensor.shape) < 2 or kind is GGMLType.F32:
        return 0
    if device_bytes(kind, tensor.nbytes) != tensor.nbytes:
        return 0
    kernels = _has_kernels(gpu, kind)
    if kernels and (tensor.name in (_EMBEDDING, _OUTPUT) or kind is GGMLType.F16):
        return 0
    return tensor.n_elements * (2 if kernels and kind is not GGMLType.BF16 else 4)


def _has_kernels(gpu: Gpu, kind: GGMLType) -> bool:
    """Whether matrices of a type that MLX has no form for are multiplied by kernels of our own."""
    if gpu.kind == "metal":
        return kind not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
    return gpu.kind == "cuda"


def _of_experts(layers: Iterable[list[Tensor]], amount: Callable[[Tensor], int]) -> tuple[int, ...]:
    """The amounts of one expert, for each layer."""
    return tuple(sum(amount(t) // t.shape[-1] for t in layer) for layer in layers)

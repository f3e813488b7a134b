"""The CPU device: every operation is one call into the native library, without the GIL.

Hidden states are float32 arrays [n_tokens, hidden] and are updated in place. Weights are used as
they lie in the file; only the keys of legacy `kv_b` tensors are rewritten, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from localds import _native
from localds.gguf import GGMLType
from localds.ops.tensors import (
    Floats,
    check_frequencies,
    check_tensor,
    dimension,
    present,
    read_vector,
    row_stride,
    vector_width,
)

if TYPE_CHECKING:
    from localds.gguf import Tensor
    from localds.memory.experts import ExpertStore
    from localds.memory.latents import LayerCache
    from localds.ops import (
        FfnWeights,
        GqaShape,
        GqaWeights,
        MlaShape,
        MlaWeights,
        MoeWeights,
        Router,
    )
    from localds.ops.recording import Recording

Gated = tuple[_native.Matrix, _native.Matrix, _native.Matrix]
"""The gate, up and down matrices of a SwiGLU."""


class _NativeAttention(Protocol):
    def forward(
        self,
        x: Floats,
        cache: NDArray[np.uint8],
        cache_type: int,
        cache_width: int,
        past: int,
        recorder: _native.Recorder | None,
    ) -> None: ...


class _NativeFeedForward(Protocol):
    def forward(self, x: Floats, recorder: _native.Recorder | None) -> None: ...


@dataclass(frozen=True, slots=True)
class CpuEmbedding:
    """Looks up rows of the embedding table; raises `ValueError` for ids outside it."""

    table: _native.Matrix

    def __call__(self, ids: NDArray[np.int32]) -> Floats:
        """Return the rows of `ids` int32 [n_tokens]."""
        x = np.empty((len(ids), self.table.cols), np.float32)
        _native.embed(self.table, np.ascontiguousarray(ids, np.int32), x)
        return x


@dataclass(frozen=True, slots=True)
class CpuAttention:
    """An attention layer; raises `ValueError` for a cache of another width or without room."""

    layer: _NativeAttention
    recorder: _native.Recorder | None

    def __call__(self, x: Floats, cache: LayerCache, past: int) -> Floats:
        """Return x, updated, after writing rows `past` and on of the cache."""
        self.layer.forward(x, cache.data, cache.type, cache.width, past, self.recorder)
        return x


@dataclass(frozen=True, slots=True)
class CpuFeedForward:
    """A dense feed-forward or mixture-of-experts layer."""

    layer: _NativeFeedForward
    recorder: _native.Recorder | None

    def __call__(self, x: Floats) -> Floats:
        """Return x, updated."""
        self.layer.forward(x, self.recorder)
        return x


@dataclass(frozen=True, slots=True)
class CpuMoe(CpuFeedForward):
    """A mixture-of-experts layer whose choices can be looked at, and are counted."""

    layer: _native.MoeLayer
    top_k: int

    def route(self, x: Floats) -> tuple[NDArray[np.int32], Floats]:
        """Experts int32 and their weights float32 that x would go to, both [n_tokens, top_k]."""
        ids = np.empty((len(x), self.top_k), np.int32)
        weights = np.empty((len(x), self.top_k), np.float32)
        self.layer.route(x, ids, weights)
        return ids, weights

    def uses(self) -> NDArray[np.uint64]:
        """Tokens sent to each expert since the layer was made, uint64 [experts].

        From any thread, also while the layer computes.
        """
        return self.layer.uses()

    def set_elsewhere(self, experts: NDArray[np.uint8]) -> None:
        """Leave to a GPU those of the experts uint8 [experts] that are 1; see `add_rest`."""
        self.layer.set_elsewhere(experts)

    def add_rest(self, x: Floats, ids: NDArray[np.int32], weights: Floats, out: Floats) -> None:
        """Add to out [n_tokens, hidden] the chosen experts of norm(x) that are not elsewhere.

        `ids` and `weights` [n_tokens, top_k] are the choice, made by somebody else.
        """
        self.layer.add_rest(x, ids, weights, out)


@dataclass(frozen=True, slots=True)
class CpuHead:
    """The final norm and the output matrix."""

    layer: _native.HeadLayer
    recorder: _native.Recorder | None
    vocabulary: int

    def __call__(self, x: Floats, *, last_only: bool) -> Floats:
        """Return logits of every row, or of the last alone."""
        rows = x[-1:] if last_only else x
        logits = np.empty((len(rows), self.vocabulary), np.float32)
        self.layer.forward(rows, logits, self.recorder)
        return logits


class CpuOps:
    """`Ops` over the native library.

    Layers prepared with a `recording` add to it what their weights are multiplied with. With a
    store of `experts`, routed experts are taken from there when they are needed.
    """

    def __init__(
        self, recording: Recording | None = None, experts: ExpertStore | None = None
    ) -> None:
        self._recording = recording
        self._experts = experts

    def _recorder(self, **inputs: tuple[Tensor | None, ...]) -> _native.Recorder | None:
        return None if self._recording is None else self._recording.recorder(**inputs)

    def embedding(self, table: Tensor) -> CpuEmbedding:
        """Prepare a lookup in `table` {hidden, n_vocab}."""
        return CpuEmbedding(_matrix(table, (table.shape[0], table.shape[-1])))

    def mla(self, weights: MlaWeights, shape: MlaShape) -> CpuAttention:
        """Prepare a multi-head latent attention layer."""
        w = weights
        hidden = vector_width(w.norm)
        queries = shape.heads * (shape.nope + shape.rope_width)
        if w.q_a is not None:
            q_norm_tensor = present(w.q_a_norm, "q_a_norm", "q_a")
            rank = vector_width(q_norm_tensor)
            q_a = _matrix(w.q_a, (hidden, rank))
            q_norm = read_vector(q_norm_tensor, rank)
            q = _matrix(present(w.q_b, "q_b", "q_a"), (rank, queries))
        else:
            q_a, q_norm = None, None
            q = _matrix(present(w.q, "q", "MLA without q_a"), (hidden, queries))
        k_b, v_b = _latent_heads(w, shape)
        return CpuAttention(
            _native.MlaLayer(
                norm=read_vector(w.norm, hidden),
                q_a=q_a,
                q_norm=q_norm,
                q=q,
                kv_a=_matrix(w.kv_a, (hidden, shape.kv_rank + shape.rope_width)),
                kv_norm=read_vector(w.kv_a_norm, shape.kv_rank),
                k_b=k_b,
                v_b=v_b,
                output=_matrix(w.output, (shape.heads * shape.value, hidden)),
                inverse_frequencies=check_frequencies(
                    shape.rope.inverse_frequencies, shape.rope_width
                ),
                amplitude=shape.rope.amplitude,
                softmax_scale=shape.softmax_scale,
                eps=shape.eps,
                latent_eps=shape.latent_eps,
            ),
            self._recorder(
                hidden=(w.q, w.q_a, w.kv_a),
                low_query=(w.q_b,),
                latent=(w.kv_b,),
                query=(w.k_b,),
                context=(w.v_b,),
                values=(w.output,),
            ),
        )

    def gqa(self, weights: GqaWeights, shape: GqaShape) -> CpuAttention:
        """Prepare a grouped-query attention layer."""
        hidden = vector_width(weights.norm)
        keys = (hidden, shape.kv_heads * shape.head)
        return CpuAttention(
            _native.GqaLayer(
                norm=read_vector(weights.norm, hidden),
                q=_matrix(weights.q, (hidden, shape.heads * shape.head)),
                k=_matrix(weights.k, keys),
                v=_matrix(weights.v, keys),
                output=_matrix(weights.output, (shape.heads * shape.head, hidden)),
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                inverse_frequencies=check_frequencies(
                    shape.rope.inverse_frequencies, 2 * len(shape.rope.inverse_frequencies)
                ),
                amplitude=shape.rope.amplitude,
                softmax_scale=shape.softmax_scale,
                eps=shape.eps,
            ),
            self._recorder(hidden=(weights.q, weights.k, weights.v), values=(weights.output,)),
        )

    def ffn(self, weights: FfnWeights, eps: float) -> CpuFeedForward:
        """Prepare a dense feed-forward layer."""
        hidden = vector_width(weights.norm)
        gate, up, down = _gated(weights.gate, weights.up, weights.down, hidden)
        return CpuFeedForward(
            _native.FfnLayer(
                norm=read_vector(weights.norm, hidden), gate=gate, up=up, down=down, eps=eps
            ),
            self._recorder(hidden=(weights.gate, weights.up), middle=(weights.down,)),
        )

    def moe(self, weights: MoeWeights, router: Router, eps: float) -> CpuMoe:
        """Prepare a mixture-of-experts layer."""
        w = weights
        hidden = vector_width(w.norm)
        gate, up, down = _experts(w, hidden, router.n_experts)
        shared: Gated | tuple[None, None, None] = (None, None, None)
        if w.shared_gate is not None:
            shared = _gated(
                w.shared_gate,
                present(w.shared_up, "shared_up", "shared_gate"),
                present(w.shared_down, "shared_down", "shared_gate"),
                hidden,
            )
        bias = None if w.router_bias is None else read_vector(w.router_bias, router.n_experts)
        grouped = router.groups > 1
        native_router = _native.Router(
            top_k=router.top_k,
            gating=router.gating,
            normalize=router.normalize,
            scale=router.scale,
            groups=router.groups if grouped else 1,
            groups_used=router.groups_used if grouped else 1,
            group_score=router.group_score,
            bias=bias,
        )
        layer = _native.MoeLayer(
            norm=read_vector(w.norm, hidden),
            router_weight=_float_matrix(w.router, (hidden, router.n_experts)),
            router=native_router,
            gate=gate,
            up=up,
            down=down,
            shared_gate=shared[0],
            shared_up=shared[1],
            shared_down=shared[2],
            eps=eps,
        )
        if self._experts is not None:
            self._experts.attach(layer, w)
        recorder = self._recorder(
            hidden=(w.router, w.shared_gate, w.shared_up),
            expert_hidden=(w.gate, w.up, w.gate_up),
            expert_middle=(w.down,),
            shared_middle=(w.shared_down,),
        )
        return CpuMoe(layer, recorder, router.top_k)

    def head(self, norm: Tensor, output: Tensor, eps: float) -> CpuHead:
        """Prepare the final norm and `output` {hidden, n_vocab}."""
        hidden = vector_width(norm)
        vocabulary = output.shape[-1]
        matrix = _matrix(output, (hidden, vocabulary))
        return CpuHead(
            _native.HeadLayer(read_vector(norm, hidden), matrix, eps),
            self._recorder(hidden=(output,)),
            vocabulary,
        )


def _latent_heads(w: MlaWeights, shape: MlaShape) -> tuple[_native.Matrix, _native.Matrix]:
    """Each head's k_b [kv_rank, nope] and v_b [value, kv_rank]."""
    if w.kv_b is not None:
        return _split_legacy(w.kv_b, shape)
    k_b = present(w.k_b, "k_b", "MLA without kv_b")
    v_b = present(w.v_b, "v_b", "MLA without kv_b")
    return (
        _matrix(k_b, (shape.nope, shape.kv_rank, shape.heads)),
        _matrix(v_b, (shape.kv_rank, shape.value, shape.heads)),
    )


def _split_legacy(kv_b: Tensor, shape: MlaShape) -> tuple[_native.Matrix, _native.Matrix]:
    """k_b and v_b from a tensor that holds each head's key rows, then its value rows."""
    rows = shape.nope + shape.value
    check_tensor(kv_b, (shape.kv_rank, shape.heads * rows))
    head_bytes = rows * row_stride(kv_b)
    keys = _native.dequantize(_view(kv_b, shape.nope, shape.heads, 0, head_bytes))
    # The absorbed form multiplies by the transpose, which no block type can be read as.
    kind = GGMLType.F32 if kv_b.type == GGMLType.F32 else GGMLType.F16
    transposed = np.ascontiguousarray(
        keys.transpose(0, 2, 1), np.float32 if kind == GGMLType.F32 else np.float16
    )
    data = transposed.view(np.uint8).reshape(-1)
    k_b = _native.Matrix(kind, shape.kv_rank, shape.nope, shape.heads, data)
    value_offset = shape.nope * row_stride(kv_b)
    return k_b, _view(kv_b, shape.value, shape.heads, value_offset, head_bytes)


def _gated(gate: Tensor, up: Tensor, down: Tensor, hidden: int) -> Gated:
    width = dimension(gate, 1)
    return (
        _matrix(gate, (hidden, width)),
        _matrix(up, (hidden, width)),
        _matrix(down, (width, hidden)),
    )


def _experts(w: MoeWeights, hidden: int, experts: int) -> Gated:
    """The stacked gate, up and down matrices; a fused gate_up is seen as two views."""
    width = dimension(w.down, 0)
    down = _matrix(w.down, (width, hidden, experts))
    if w.gate_up is None:
        gate = present(w.gate, "gate", "MoE without gate_up")
        up = present(w.up, "up", "MoE without gate_up")
        return (
            _matrix(gate, (hidden, width, experts)),
            _matrix(up, (hidden, width, experts)),
            down,
        )
    check_tensor(w.gate_up, (hidden, 2 * width, experts))
    stride = w.gate_up.nbytes // experts
    return (
        _view(w.gate_up, width, experts, 0, stride),
        _view(w.gate_up, width, experts, stride // 2, stride),
        down,
    )


def _matrix(tensor: Tensor, expected: tuple[int, ...]) -> _native.Matrix:
    """The tensor as `expected[2]` matrices of {expected[0], expected[1]}."""
    check_tensor(tensor, expected)
    cols, rows, batch = (*expected, 1)[:3]
    return _native.Matrix(tensor.type, rows, cols, batch, tensor.data)


def _float_matrix(tensor: Tensor, expected: tuple[int, int]) -> _native.Matrix:
    """Like `_matrix`, for a tensor that must hold plain floats."""
    if tensor.type not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        raise ValueError(
            f"tensor {tensor.name!r} has type {tensor.type.name}, expected F32; "
            "requantize the model without quantizing this tensor"
        )
    return _matrix(tensor, expected)


def _view(tensor: Tensor, rows: int, batch: int, offset: int, stride: int) -> _native.Matrix:
    """`batch` matrices of `rows` rows, `stride` bytes apart, the first at byte `offset`."""
    end = offset + (batch - 1) * stride + rows * row_stride(tensor)
    data = tensor.data[offset:end]
    return _native.Matrix(tensor.type, rows, tensor.shape[0], batch, data, batch_bytes=stride)

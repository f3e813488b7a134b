"""`Ops` on MLX: weights brought to the device and put together into layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from localds.gguf import GGMLType
from localds.ops.mlx.attention import MlxGqa, MlxMla
from localds.ops.mlx.backend import PORTABLE
from localds.ops.mlx.blocks import dequantize
from localds.ops.mlx.cache import Turns
from localds.ops.mlx.feed_forward import MlxFfn, MlxMoe, UseCounter
from localds.ops.mlx.matrix import PLAIN, PlainMatrix, plain_array
from localds.ops.tensors import (
    check_frequencies,
    check_shape,
    check_tensor,
    dimension,
    present,
    read_vector,
    row_stride,
    vector_width,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from localds.gguf import Tensor
    from localds.ops import (
        FfnWeights,
        GqaShape,
        GqaWeights,
        MlaShape,
        MlaWeights,
        MoeWeights,
        Rope,
        Router,
    )
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.feed_forward import Gated
    from localds.ops.mlx.matrix import Bytes, Matrix
    from localds.ops.mlx.split import SplitMoe
    from localds.ops.mlx.splitting import Split


@dataclass(frozen=True, slots=True)
class MlxEmbedding:
    """Looks up rows of the embedding table; raises `ValueError` for ids outside it."""

    table: Matrix
    vocabulary: int

    def __call__(self, ids: NDArray[np.int32] | mx.array) -> mx.array:
        """Return the rows of `ids` int32 [n_tokens]; ids on the device are not checked."""
        if isinstance(ids, np.ndarray):
            self.check(ids)
        return self.table.lookup(mx.array(ids))

    def check(self, ids: NDArray[np.int32]) -> None:
        """Raise `ValueError` for an id outside the vocabulary."""
        outside = ids[(ids < 0) | (ids >= self.vocabulary)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocabulary}"
            )


@dataclass(frozen=True, slots=True)
class MlxHead:
    """The final norm and the output matrix."""

    norm: mx.array
    output: Matrix
    eps: float

    def __call__(self, x: mx.array, *, last_only: bool) -> NDArray[np.float32]:
        """Return logits of every row, or of the last alone, once they are computed."""
        return np.array(self.logits(x[-1:] if last_only else x))

    def logits(self, x: mx.array) -> mx.array:
        """The same on the device."""
        return self.output(mx.fast.rms_norm(x, self.norm, self.eps))


class MlxOps:
    """`Ops` over MLX, on its default device. Hidden states are float32 arrays there.

    The `backend` decides how the device keeps matrices and computes with them. With a `split`, not
    all routed experts lie on the device. `on_loaded` is told of tensors, and
    how many bytes of them do.
    """

    def __init__(
        self,
        backend: Backend = PORTABLE,
        split: Split | None = None,
        on_loaded: Callable[[Tensor, int], None] = lambda tensor, nbytes: None,  # noqa: ARG005
    ) -> None:
        self._backend = backend
        self._split = split
        self._on_loaded = on_loaded
        self._turns: dict[int, Turns] = {}
        self._table: tuple[Tensor, Matrix] | None = None

    def embedding(self, table: Tensor) -> MlxEmbedding:
        """Prepare a lookup in `table` {hidden, n_vocab}."""
        matrix = self._matrix(table, (table.shape[0], table.shape[-1]))
        self._table = table, matrix
        return MlxEmbedding(matrix, table.shape[-1])

    def mla(self, weights: MlaWeights, shape: MlaShape) -> MlxMla:
        """Prepare a multi-head latent attention layer."""
        w = weights
        hidden = vector_width(w.norm)
        queries = shape.heads * (shape.nope + shape.rope_width)
        q_a, q_norm = None, None
        if w.q_a is not None:
            norm = present(w.q_a_norm, "q_a_norm", "q_a")
            rank = vector_width(norm)
            q_a = self._matrix(w.q_a, (hidden, rank))
            q_norm = _array(norm, rank)
            q = self._matrix(present(w.q_b, "q_b", "q_a"), (rank, queries))
        else:
            q = self._matrix(present(w.q, "q", "MLA without q_a"), (hidden, queries))
        k_b, v_b = self._latent_heads(w, shape)
        return self._backend.mla(
            shape=shape,
            turns=self._turns_of(shape.rope, shape.rope_width),
            norm=_array(w.norm, hidden),
            q_a=q_a,
            q_norm=q_norm,
            q=q,
            kv_a=self._matrix(w.kv_a, (hidden, shape.kv_rank + shape.rope_width)),
            kv_norm=_array(w.kv_a_norm, shape.kv_rank),
            k_b=k_b,
            v_b=v_b,
            output=self._matrix(w.output, (shape.heads * shape.value, hidden)),
        )

    def gqa(self, weights: GqaWeights, shape: GqaShape) -> MlxGqa:
        """Prepare a grouped-query attention layer."""
        hidden = vector_width(weights.norm)
        keys = (hidden, shape.kv_heads * shape.head)
        return MlxGqa(
            shape=shape,
            turns=self._turns_of(shape.rope, 2 * len(shape.rope.inverse_frequencies)),
            norm=_array(weights.norm, hidden),
            q=self._matrix(weights.q, (hidden, shape.heads * shape.head)),
            k=self._matrix(weights.k, keys),
            v=self._matrix(weights.v, keys),
            output=self._matrix(weights.output, (shape.heads * shape.head, hidden)),
        )

    def ffn(self, weights: FfnWeights, eps: float) -> MlxFfn:
        """Prepare a dense feed-forward layer."""
        hidden = vector_width(weights.norm)
        layer = self._gated(weights.gate, weights.up, weights.down, hidden)
        return MlxFfn(_array(weights.norm, hidden), eps, layer)

    def moe(self, weights: MoeWeights, router: Router, eps: float) -> MlxMoe | SplitMoe:
        """Prepare a mixture-of-experts layer."""
        w = weights
        hidden = vector_width(w.norm)
        shared = None
        if w.shared_gate is not None:
            shared = self._gated(
                w.shared_gate,
                present(w.shared_up, "shared_up", "shared_gate"),
                present(w.shared_down, "shared_down", "shared_gate"),
                hidden,
            )
        bias = None if w.router_bias is None else _array(w.router_bias, router.n_experts)
        choose = self._backend.router(
            router, float_matrix(w.router, (hidden, router.n_experts)), bias
        )
        self._on_loaded(w.router, w.router.nbytes)
        tensors = expert_tensors(w, hidden, router.n_experts)
        if self._split is not None and self._split.next_slots() < router.n_experts:
            layer = self._split.layer(
                norm=_array(w.norm, hidden),
                eps=eps,
                choose=choose,
                shared=shared,
                host=self._split.host(tensors, router.n_experts, w),
                rest=self._split.cpu.moe(_without_shared(w), router, eps),
            )
            of_all = len(layer.slots.experts) / router.n_experts
            for tensor in tensors:
                self._on_loaded(tensor, int(tensor.nbytes * of_all))
            return layer
        return MlxMoe(
            norm=_array(w.norm, hidden),
            eps=eps,
            choose=choose,
            experts=self._stack(tensors, router.n_experts),
            shared=shared,
            counter=UseCounter(router.n_experts),
        )

    def experts(self, weights: MoeWeights, experts: int) -> Gated:
        """Bring the routed experts of a layer to the device, and nothing else of it."""
        tensors = expert_tensors(weights, vector_width(weights.norm), experts)
        return self._stack(tensors, experts)

    def head(self, norm: Tensor, output: Tensor, eps: float) -> MlxHead:
        """Prepare the final norm and `output` {hidden, n_vocab}; a tied one is kept once."""
        hidden = vector_width(norm)
        if self._table and self._table[0] is output:
            matrix = self._table[1]
        else:
            matrix = self._matrix(output, (hidden, output.shape[-1]))
        return MlxHead(_array(norm, hidden), matrix, eps)

    def _matrix(self, tensor: Tensor, expected: tuple[int, ...]) -> Matrix:
        """The tensor as a matrix, or with three dimensions a stack of them."""
        check_tensor(tensor, expected)
        return self._load(tensor, _rows(tensor, expected[1:]))

    def _load(self, tensor: Tensor, rows: Bytes) -> Matrix:
        matrix = self._backend.load(tensor.type, rows)
        self._on_loaded(tensor, rows.nbytes)
        return matrix

    def _turns_of(self, rope: Rope, width: int) -> Turns:
        """One table for all layers that share a rope."""
        check_frequencies(rope.inverse_frequencies, width)
        return self._turns.setdefault(id(rope), Turns(rope))

    def _gated(self, gate: Tensor, up: Tensor, down: Tensor, hidden: int) -> Gated:
        width = dimension(gate, 1)
        return self._backend.gated(
            self._matrix(gate, (hidden, width)),
            self._matrix(up, (hidden, width)),
            self._matrix(down, (width, hidden)),
        )

    def _stack(self, tensors: Sequence[Tensor], experts: int) -> Gated:
        gate, *up, down = (
            self._load(tensor, _rows(tensor, (tensor.shape[1], experts))) for tensor in tensors
        )
        return self._backend.gated(gate, up[0] if up else None, down)

    def _latent_heads(self, w: MlaWeights, shape: MlaShape) -> tuple[Matrix, Matrix]:
        """Each head's k_b [kv_rank, nope] and v_b [value, kv_rank]."""
        if w.kv_b is not None:
            return self._split_legacy(w.kv_b, shape)
        k_b = present(w.k_b, "k_b", "MLA without kv_b")
        v_b = present(w.v_b, "v_b", "MLA without kv_b")
        return (
            self._matrix(k_b, (shape.nope, shape.kv_rank, shape.heads)),
            self._matrix(v_b, (shape.kv_rank, shape.value, shape.heads)),
        )

    def _split_legacy(self, kv_b: Tensor, shape: MlaShape) -> tuple[Matrix, Matrix]:
        """From a tensor that holds each head's key rows, then its value rows."""
        check_tensor(kv_b, (shape.kv_rank, shape.heads * (shape.nope + shape.value)))
        rows = _rows(kv_b, (shape.nope + shape.value, shape.heads))
        # The absorbed form multiplies by the transpose, which no block type can be read as.
        keys = _floats(kv_b.type, rows[:, : shape.nope]).swapaxes(1, 2)
        kind = mx.float32 if kv_b.type is GGMLType.F32 else mx.float16
        k_b = mx.contiguous(keys.astype(kind))
        mx.eval(k_b)
        v_b = self._backend.load(kv_b.type, rows[:, shape.nope :])
        self._on_loaded(kv_b, kv_b.nbytes)
        return PlainMatrix(k_b), v_b


def expert_tensors(w: MoeWeights, hidden: int, experts: int) -> tuple[Tensor, ...]:
    """Gate, up and down, or gate_up and down, checked."""
    width = dimension(w.down, 0)
    check_tensor(w.down, (width, hidden, experts))
    if w.gate_up is not None:
        check_tensor(w.gate_up, (hidden, 2 * width, experts))
        return w.gate_up, w.down
    gate = present(w.gate, "gate", "MoE without gate_up")
    up = present(w.up, "up", "MoE without gate_up")
    check_tensor(gate, (hidden, width, experts))
    check_tensor(up, (hidden, width, experts))
    return gate, up, w.down


def _without_shared(w: MoeWeights) -> MoeWeights:
    return replace(w, shared_gate=None, shared_up=None, shared_down=None)


def _rows(tensor: Tensor, outer: tuple[int, ...]) -> Bytes:
    """The tensor's bytes [..., rows, row bytes], for GGUF dimensions `outer` after the first."""
    return tensor.data.reshape(*reversed(outer), row_stride(tensor))


def _floats(kind: GGMLType, rows: Bytes) -> mx.array:
    if kind in PLAIN:
        return plain_array(kind, rows).astype(mx.float32)
    return dequantize(kind, mx.array(rows))


def _array(tensor: Tensor, length: int) -> mx.array:
    """A vector of plain floats."""
    return mx.array(read_vector(tensor, length))


def float_matrix(tensor: Tensor, expected: tuple[int, int]) -> mx.array:
    """A matrix that must hold plain floats, as float32 [rows, columns]."""
    if tensor.type not in PLAIN:
        raise ValueError(
            f"tensor {tensor.name!r} has type {tensor.type.name}, expected F32; "
            "requantize the model without quantizing this tensor"
        )
    check_shape(tensor, expected)
    weight = plain_array(tensor.type, _rows(tensor, expected[1:])).astype(mx.float32)
    mx.eval(weight)
    return weight

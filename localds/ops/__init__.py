"""The kernel contract: the few fused operations that every device implements.

An architecture file describes its layers with the dataclasses below and asks an `Ops` for
callables. It never sees how a device keeps weights or hidden states. Shapes of tensors are given in
GGUF order (the fastest dimension first), shapes of arrays in numpy order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from localds.gguf import Tensor
    from localds.memory.latents import LayerCache

X = TypeVar("X")
"""Hidden states of one device, float [n_tokens, hidden]."""
X_co = TypeVar("X_co", covariant=True)
X_contra = TypeVar("X_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of interleaved pairs (2i, 2i + 1).

    `inverse_frequencies` is float32 [rotated width / 2], in radians per position; `amplitude`
    multiplies cosine and sine.
    """

    inverse_frequencies: NDArray[np.float32]
    amplitude: float


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """Weights of one multi-head latent attention layer (DeepSeek-V2, arXiv:2405.04434, 2.1).

    Queries come from `q` {hidden, heads * (nope + rope)}, or with a query rank from `q_a`
    {hidden, q_rank}, `q_a_norm` and `q_b` {q_rank, heads * (nope + rope)}. Keys and values come
    from the latent: `k_b` {nope, kv_rank, heads} and `v_b` {kv_rank, value, heads}, or in legacy
    files together as `kv_b` {kv_rank, heads * (nope + value)}.
    """

    norm: Tensor
    kv_a: Tensor
    kv_a_norm: Tensor
    output: Tensor
    q: Tensor | None = None
    q_a: Tensor | None = None
    q_a_norm: Tensor | None = None
    q_b: Tensor | None = None
    k_b: Tensor | None = None
    v_b: Tensor | None = None
    kv_b: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Geometry of multi-head latent attention. The cached row is kv_rank values, then rope ones.

    `eps` is that of the layer's norm, `latent_eps` that of `q_a_norm` and `kv_a_norm`.
    """

    heads: int
    nope: int
    rope_width: int
    value: int
    kv_rank: int
    softmax_scale: float
    eps: float
    latent_eps: float
    rope: Rope


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """Weights of one grouped-query attention layer; q and k rows are permuted to interleaved."""

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True)
class GqaShape:
    """Geometry of grouped-query attention. The cached row is all keys (rotated), then all values.

    The first 2 * len(rope.inverse_frequencies) elements of each head are rotated.
    """

    heads: int
    kv_heads: int
    head: int
    softmax_scale: float
    eps: float
    rope: Rope


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """Weights of a SwiGLU feed-forward layer: down(silu(gate(x)) * up(x)), x normalized first."""

    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Gating(StrEnum):
    """How router logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SOFTMAX_SELECTED = "softmax_selected"  # softmax over the chosen experts' logits


class GroupScore(StrEnum):
    """How a group of experts is scored when only some groups may be chosen from."""

    MAX = "max"  # DeepSeek-V2: the best expert
    TOP2_SUM = "top2_sum"  # DeepSeek-V3: the sum of the best two


@dataclass(frozen=True, slots=True)
class Router:
    """How top_k of n_experts are chosen and weighted.

    With scores p = gating(logits) and choice c = p + bias: keep the `groups_used` groups with the
    best group score, take the top_k experts by c, weight them with p, divide by their sum (plus
    1e-20) if `normalize`, and multiply by `scale`.
    """

    n_experts: int
    top_k: int
    gating: Gating
    normalize: bool
    scale: float
    groups: int = 1
    groups_used: int = 1
    group_score: GroupScore = GroupScore.TOP2_SUM


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """Weights of a mixture-of-experts layer.

    `router` is F32 {hidden, n_experts} and `router_bias` F32 {n_experts}. Experts are stacked:
    `gate` and `up` {hidden, ff, n_experts}, or fused as `gate_up` {hidden, 2 * ff, n_experts} with
    gate first; `down` {ff, hidden, n_experts}. The shared expert is a plain SwiGLU.
    """

    norm: Tensor
    router: Tensor
    down: Tensor
    router_bias: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    gate_up: Tensor | None = None
    shared_gate: Tensor | None = None
    shared_up: Tensor | None = None
    shared_down: Tensor | None = None


class Embedding(Protocol[X_co]):
    """Token ids int32 [n_tokens] to hidden states."""

    def __call__(self, ids: NDArray[np.int32]) -> X_co:  # noqa: D102
        ...


class Attention(Protocol[X]):
    """x + attention(norm(x)); appends the tokens' rows to `cache` from row `past` on."""

    def __call__(self, x: X, cache: LayerCache, past: int) -> X:  # noqa: D102
        ...


class FeedForward(Protocol[X]):
    """x + feed_forward(norm(x))."""

    def __call__(self, x: X) -> X:  # noqa: D102
        ...


@runtime_checkable
class ExpertLayer(Protocol):
    """A feed-forward layer that chooses experts, and counts them."""

    def uses(self) -> NDArray[np.uint64]:
        """Tokens sent to each expert since the layer was made, uint64 [experts].

        From any thread, also while the layer computes.
        """
        ...


class Head(Protocol[X_contra]):
    """Final norm and output matrix: hidden states to logits, float32 [n_tokens, n_vocab].

    With `last_only`, only the last token's: [1, n_vocab].
    """

    def __call__(self, x: X_contra, *, last_only: bool) -> NDArray[np.float32]:  # noqa: D102
        ...


class Ops(Protocol, Generic[X]):
    """A device. Each method prepares weights once and returns the operation on them.

    Methods raise `ValueError` for shapes that do not fit together, naming the tensor.
    """

    def embedding(self, table: Tensor) -> Embedding[X]:
        """Prepare a lookup in `table` {hidden, n_vocab}."""
        ...

    def mla(self, weights: MlaWeights, shape: MlaShape) -> Attention[X]:
        """Prepare a multi-head latent attention layer."""
        ...

    def gqa(self, weights: GqaWeights, shape: GqaShape) -> Attention[X]:
        """Prepare a grouped-query attention layer."""
        ...

    def ffn(self, weights: FfnWeights, eps: float) -> FeedForward[X]:
        """Prepare a dense feed-forward layer."""
        ...

    def moe(self, weights: MoeWeights, router: Router, eps: float) -> FeedForward[X]:
        """Prepare a mixture-of-experts layer."""
        ...

    def head(self, norm: Tensor, output: Tensor, eps: float) -> Head[X]:
        """Prepare the final norm and `output` {hidden, n_vocab}."""
        ...

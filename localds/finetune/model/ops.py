"""`Ops` for training: the layers that MLX infers with, with adapters and without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from localds.finetune.config import EXPERTS, ROUTER
from localds.finetune.model.adapter import Adapter, Linear, StackedLinear
from localds.finetune.model.attention import TrainGqa, TrainMla
from localds.finetune.model.feed_forward import Gated, ResidentExperts, TrainFfn, TrainMoe
from localds.finetune.model.frozen import FrozenHeads, FrozenMatrix, FrozenStack
from localds.finetune.model.head import TrainHead
from localds.finetune.model.matrices import flattened, mapped, rows_of
from localds.ops import FfnWeights, Gating
from localds.ops.mlx.matrix import PlainMatrix
from localds.ops.mlx.ops import MlxOps, float_matrix
from localds.ops.tensors import present, read_vector, vector_width

if TYPE_CHECKING:
    from collections.abc import Callable

    from localds.finetune.config import AdapterConfig
    from localds.finetune.model.feed_forward import Experts
    from localds.finetune.model.frozen import Frozen
    from localds.finetune.model.offloaded_adapters import NewAdapter
    from localds.gguf import Tensor
    from localds.ops import GqaShape, GqaWeights, MlaShape, MlaWeights, MoeWeights, Router
    from localds.ops.mlx.backend import Backend
    from localds.ops.mlx.matrix import Matrix
    from localds.ops.mlx.ops import MlxEmbedding

    Split = Callable[[MoeWeights, Router, NewAdapter], Experts | None]
    """The experts of the next layer where not all lie on the device, else None."""


class TrainOps:
    """Prepares layers for training, and notes the adapters that `config` asks for."""

    def __init__(self, config: AdapterConfig, backend: Backend, split: Split | None = None) -> None:
        self.adapters: list[Adapter] = []
        self._config = config
        self._split = split
        self._ops = MlxOps(backend)

    def embedding(self, table: Tensor) -> MlxEmbedding:
        """Prepare a lookup in `table` {hidden, n_vocab}."""
        return self._ops.embedding(table)

    def mla(self, weights: MlaWeights, shape: MlaShape) -> TrainMla:
        """Prepare a multi-head latent attention layer."""
        w, layer = weights, self._ops.mla(weights, shape)
        q_a, q, q_target = None, w.q, "q_proj"
        if layer.q_a is not None:
            q_a = self._linear(layer.q_a, present(w.q_a, "q_a", "q_b"), "q_a_proj")
            q, q_target = w.q_b, "q_b_proj"
        heads = FrozenHeads(layer.k_b, flattened(layer.v_b), shape.heads)
        block = w.kv_a.name.removesuffix("attn_kv_a_mqa.weight")
        rows = shape.heads * (shape.nope + shape.value)
        kv_b = (rows, shape.kv_rank)
        return TrainMla(
            shape=shape,
            turns=layer.turns,
            norm=layer.norm,
            q_a=q_a,
            q_norm=layer.q_norm,
            q=self._linear(layer.q, present(q, "q", "MLA"), q_target),
            kv_a=self._linear(layer.kv_a, w.kv_a, "kv_a_proj_with_mqa"),
            kv_norm=layer.kv_norm,
            kv_b=self._adapted(heads, block + "attn_kv_b", kv_b, "kv_b_proj"),
            output=self._linear(layer.output, w.output, "o_proj"),
        )

    def gqa(self, weights: GqaWeights, shape: GqaShape) -> TrainGqa:
        """Prepare a grouped-query attention layer."""
        layer = self._ops.gqa(weights, shape)
        return TrainGqa(
            shape=shape,
            turns=layer.turns,
            norm=layer.norm,
            q=self._linear(layer.q, weights.q, "q_proj"),
            k=self._linear(layer.k, weights.k, "k_proj"),
            v=self._linear(layer.v, weights.v, "v_proj"),
            output=self._linear(layer.output, weights.output, "o_proj"),
        )

    def ffn(self, weights: FfnWeights, eps: float) -> TrainFfn:
        """Prepare a dense feed-forward layer."""
        w, layer = weights, self._ops.ffn(weights, eps)
        up = layer.layer.up
        assert up is not None  # noqa: S101  only experts may have both in one
        gated = Gated(
            self._linear(layer.layer.gate, w.gate, "gate_proj"),
            self._linear(up, w.up, "up_proj"),
            self._linear(layer.layer.down, w.down, "down_proj"),
        )
        return TrainFfn(layer.norm, eps, gated)

    def moe(self, weights: MoeWeights, router: Router, eps: float) -> TrainMoe:
        """Prepare a mixture-of-experts layer."""
        w, experts = weights, router.n_experts
        hidden = vector_width(w.norm)
        chooser = PlainMatrix(float_matrix(w.router, (hidden, experts)))
        targets = self._config.targets
        return TrainMoe(
            norm=mx.array(read_vector(w.norm, hidden)),
            eps=eps,
            router=router,
            logits=self._linear(chooser, w.router, ROUTER),
            bias=None if w.router_bias is None else mx.array(read_vector(w.router_bias, experts)),
            experts=self._elsewhere(w, router) or self._experts(w, router),
            shared=self._shared(w, eps),
            balanced=router.gating is not Gating.SIGMOID
            and w.router_bias is None
            and (ROUTER in targets or EXPERTS in targets),
        )

    def head(self, norm: Tensor, output: Tensor, eps: float) -> TrainHead:
        """Prepare the final norm and `output` {hidden, n_vocab}."""
        layer = self._ops.head(norm, output, eps)
        return TrainHead(layer.norm, layer.output, eps)

    def _shared(self, w: MoeWeights, eps: float) -> Gated | None:
        if w.shared_gate is None:
            return None
        up = present(w.shared_up, "shared_up", "shared_gate")
        down = present(w.shared_down, "shared_down", "shared_gate")
        return self.ffn(FfnWeights(w.norm, w.shared_gate, up, down), eps).layer

    def _elsewhere(self, w: MoeWeights, router: Router) -> Experts | None:
        if self._split is None:
            return None
        return self._split(
            w, router, lambda name, shape, squares: self._adapter(name, shape, EXPERTS, squares)
        )

    def _experts(self, w: MoeWeights, router: Router) -> ResidentExperts:
        stacks = self._ops.experts(w, router.n_experts)
        gate, up = stacks.gate, stacks.up
        if up is None:
            width = rows_of(gate) // 2
            halves = slice(0, width), slice(width, None)
            gate, up = (_rows(stacks.gate, half) for half in halves)
        block = w.down.name.removesuffix("ffn_down_exps.weight")
        hidden, width = vector_width(w.norm), w.down.shape[0]
        return ResidentExperts(
            self._stacked(gate, block + "ffn_gate_exps", (router.n_experts, width, hidden)),
            self._stacked(up, block + "ffn_up_exps", (router.n_experts, width, hidden)),
            self._stacked(stacks.down, block + "ffn_down_exps", (router.n_experts, hidden, width)),
        )

    def _linear(self, matrix: Matrix, tensor: Tensor, target: str) -> Linear:
        shape = tensor.shape[1], tensor.shape[0]
        name = tensor.name.removesuffix(".weight")
        return self._adapted(FrozenMatrix(matrix), name, shape, target)

    def _adapted(self, frozen: Frozen, name: str, shape: tuple[int, ...], target: str) -> Linear:
        return Linear(frozen, self._adapter(name, shape, target, frozen.row_squares))

    def _stacked(self, matrix: Matrix, name: str, shape: tuple[int, ...]) -> StackedLinear:
        frozen = FrozenStack(matrix)
        return StackedLinear(frozen, self._adapter(name, shape, EXPERTS, frozen.row_squares))

    def _adapter(
        self,
        name: str,
        shape: tuple[int, ...],
        target: str,
        row_squares: Callable[[], mx.array],
    ) -> Adapter | None:
        """The adapter for a tensor; None if `target` is not asked for."""
        config = self._config
        if target not in config.targets:
            return None
        adapter = Adapter(
            name=name,
            number=len(self.adapters),
            shape=shape,
            rank=config.rank,
            scale=config.scale,
            dropout=config.dropout,
            squares=row_squares() if config.method == "dora" else None,
        )
        self.adapters.append(adapter)
        return adapter


def _rows(stack: Matrix, part: slice) -> Matrix:
    """The same rows of all matrices of a stack, in memory of their own."""
    taken = mapped(stack, lambda array: mx.contiguous(array[:, part]))
    mx.eval(taken.arrays())
    return taken

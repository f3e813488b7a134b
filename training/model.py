"""DeepSeek-V3's architecture in torch, small, for training on a CPU.

Parameters have the names of the published checkpoints, but for the experts, which are stacked:
`experts.gate_up` [experts, 2 * width, hidden] and `experts.down` [experts, hidden, width].
Weights are float32; `forward` computes with whatever copies it is given (bfloat16 in training).
The formulas are those of the DeepSeek-V3 report (arXiv 2412.19437), section 2.1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ROOM_STEP = 256
_FUSED_ABOVE = 512
_LOSS_ROWS = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """The fields of config.json that shape the model; names as there."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    n_shared_experts: int = 1
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.0
    kv_lora_rank: int = 64
    q_lora_rank: int = 128
    qk_rope_head_dim: int = 16
    qk_nope_head_dim: int = 32
    v_head_dim: int = 32
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "num_key_value_heads": self.num_attention_heads,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rope_scaling": None,
            "torch_dtype": "float32",
            **asdict(self),
        }


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last axis."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`; the mean is taken in float32."""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        return x * scale.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head latent attention with a query rank, in the expanded form."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        heads, hidden = shape.num_attention_heads, shape.hidden_size
        nope, rope, value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
        self.heads, self.nope, self.rope, self.value = heads, nope, rope, value
        self.rank = shape.kv_lora_rank
        self.q_a_proj = nn.Linear(hidden, shape.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(shape.q_lora_rank, 1e-6)
        self.q_b_proj = nn.Linear(shape.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6)
        self.kv_b_proj = nn.Linear(self.rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, tokens, hidden]; `cos` and `sin` [tokens, rope / 2]."""
        batch, tokens, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, tokens, self.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv = kv.view(batch, tokens, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], -1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, self.heads, -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        out = causal_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        return self.o_proj(out)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, all [batch, heads, tokens, width].

    Torch's fused kernel saves memory, but its gradient is 2 to 5 times slower on a CPU where
    sequences are short.
    """
    batch, heads, tokens, width = q.shape
    if tokens > _FUSED_ABOVE:
        padded = functional.pad(v, (0, width - v.shape[-1]))  # its fast path wants equal widths
        out = functional.scaled_dot_product_attention(q, k, padded, is_causal=True)
        return out[..., : v.shape[-1]]
    flat_q, flat_k, flat_v = (x.reshape(batch * heads, tokens, -1) for x in (q, k, v))
    mask = torch.full((1, tokens, tokens), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(
        mask.expand(batch * heads, -1, -1), flat_q, flat_k.transpose(1, 2), alpha=width**-0.5
    )
    return torch.bmm(scores.softmax(-1), flat_v).view(batch, heads, tokens, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over neighbouring pairs, as DeepSeek's checkpoints have them."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class FeedForward(nn.Module):
    """silu(gate(x)) * up(x), then down: the dense layer and the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores; the experts are chosen by score plus bias, from the best groups."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.n_routed_experts, shape.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))
        self.load = torch.zeros(shape.n_routed_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [tokens, hidden] to expert ids and weights [tokens, top_k], and all scores."""
        shape = self.shape
        scores = torch.sigmoid(functional.linear(x.float(), self.weight.float()))
        with torch.no_grad():
            biased = scores + self.e_score_correction_bias
            groups = biased.view(len(x), shape.n_group, -1)
            best = groups.topk(2, -1).values.sum(-1).topk(shape.topk_group, -1).indices
            allowed = torch.zeros(len(x), shape.n_group, dtype=torch.bool).scatter_(1, best, True)
            biased = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
            ids = biased.topk(shape.num_experts_per_tok, -1).indices
            self.load = torch.bincount(ids.flatten(), minlength=shape.n_routed_experts)
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * shape.routed_scaling_factor
        return ids, weights.to(x.dtype), scores

    def rebalance(self, speed: float) -> None:
        """Nudge the bias of every expert towards an even load (report, section 2.1.2)."""
        load = self.load.float()
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load)


class Experts(nn.Module):
    """The routed experts of a layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts, hidden, width = (
            shape.n_routed_experts,
            shape.hidden_size,
            shape.moe_intermediate_size,
        )
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts; `x` [tokens, hidden]."""
        top_k, hidden = ids.shape[1], x.shape[1]
        slots, rows, room = self._places(ids)
        repeated = x.unsqueeze(1).expand(-1, top_k, -1).reshape(-1, hidden)
        placed = Gather.apply(repeated, rows, slots).view(len(self.down), room, hidden)
        gate, up = torch.bmm(placed, self.gate_up.transpose(1, 2)).chunk(2, -1)
        out = torch.bmm(functional.silu(gate) * up, self.down.transpose(1, 2))
        out = Gather.apply(out.view(-1, hidden), slots, rows).view(len(x), top_k, hidden)
        return torch.einsum("tkh,tk->th", out, weights)

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor, int]:
        """Where each choice goes in a table of equal room for every expert.

        Returns the slots [tokens * top_k], the row that each slot holds (one past the last for
        none), and the room. Room comes in steps, for every new size costs compiling kernels.
        """
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.down))
        room = -(-int(counts.max()) // _ROOM_STEP) * _ROOM_STEP
        starts = counts.cumsum(0) - counts
        chosen = flat[order]
        places = chosen * room + torch.arange(len(flat)) - starts[chosen]
        slots = torch.empty_like(order).scatter_(0, order, places)
        rows = torch.full((len(self.down) * room,), len(flat)).scatter_(0, places, order)
        return slots, rows, room


class Gather(torch.autograd.Function):
    """`x[index]`, whose gradient is `gradient[inverse]`; an index past the end gives zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        return _take(gradient, *ctx.saved_tensors), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, 1)).index_select(0, index)


class MoE(nn.Module):
    """Router, routed experts and shared expert."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = Router(shape)
        self.experts = Experts(shape)
        width = shape.moe_intermediate_size * shape.n_shared_experts
        self.shared_experts = FeedForward(shape.hidden_size, width)
        self.balance_loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """`x` [batch, tokens, hidden]."""
        flat = x.reshape(-1, x.shape[-1])
        ids, weights, scores = self.gate(flat)
        self.balance_loss = self._balance(ids, scores, x.shape[0])
        return self.experts(flat, ids, weights).view_as(x) + self.shared_experts(x)

    def _balance(self, ids: Tensor, scores: Tensor, batch: int) -> Tensor:
        """Balance within each sequence (report, equations 17 to 20), without its factor."""
        experts, top_k = scores.shape[1], ids.shape[1]
        ids, scores = ids.view(batch, -1), scores.view(batch, -1, experts)
        counts = torch.zeros(batch, experts).scatter_add_(1, ids, torch.ones(ids.shape))
        share = counts * experts / (top_k * scores.shape[1])
        mean = (scores / scores.sum(-1, keepdim=True)).mean(1)
        return (share * mean).sum(-1).mean()


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        dense = index < shape.first_k_dense_replace
        self.mlp = FeedForward(shape.hidden_size, shape.intermediate_size) if dense else MoE(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        half = torch.arange(0, shape.qk_rope_head_dim, 2) / shape.qk_rope_head_dim
        positions = torch.arange(shape.max_position_embeddings).float()
        angles = torch.outer(positions, shape.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [batch, tokens] to hidden states [batch, tokens, hidden]."""
        x = functional.embedding(ids, self.embed_tokens.weight)
        tokens = ids.shape[1]
        cos, sin = self.cos[:tokens].to(x.dtype), self.sin[:tokens].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Guide(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of `ids` [batch, tokens]; with `targets`, the mean loss of those that are not -1.

        Logits and loss are float32.
        """
        states = self.model(ids)
        if targets is None:
            return self.lm_head(states).float()
        wanted = targets >= 0
        return HeadLoss.apply(states[wanted], self.lm_head.weight, targets[wanted])

    def mixtures(self) -> list[MoE]:
        """The layers with experts, in order."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoE)]


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `states` @ `weight`.T, some rows at a time.

    Its gradients are computed on the way, so that the logits of a whole batch never exist.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight).float()
        total = torch.zeros(())
        for start in range(0, len(states), _LOSS_ROWS):
            rows, goal = states[start : start + _LOSS_ROWS], targets[start : start + _LOSS_ROWS]
            logits = functional.linear(rows, weight).float()
            likelihood = logits.log_softmax(-1)
            total -= likelihood.gather(1, goal.unsqueeze(1)).sum()
            slope = likelihood.exp_()
            slope[torch.arange(len(goal)), goal] -= 1
            slope = (slope / len(states)).to(states.dtype)
            grad_states[start : start + _LOSS_ROWS] = slope @ weight
            grad_weight += slope.t() @ rows
        ctx.save_for_backward(grad_states, grad_weight.to(weight.dtype))
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        grad_states, grad_weight = ctx.saved_tensors
        return (
            grad_states * gradient.to(grad_states.dtype),
            grad_weight * gradient.to(grad_weight.dtype),
            None,
        )


def checkpoint_tensors(model: Guide) -> dict[str, Tensor]:
    """The weights by the names that published checkpoints have, one tensor per expert."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if kind == "gate_up":
            for i, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                tensors[f"{stem}.{i}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{stem}.{i}.up_proj.weight"] = up.contiguous()
        elif kind == "down":
            tensors |= {f"{stem}.{i}.down_proj.weight": part for i, part in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return {name: tensor.clone() for name, tensor in tensors.items()}

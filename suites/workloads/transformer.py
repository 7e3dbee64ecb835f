"""The parts of the small transformers: attention with an exchangeable core, and an FFN made of routed experts.

Shape letters: B sequences, T tokens, H hidden, A heads, D head width, E experts, F expert width, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...moe.balance.registry import Term, total
from ...moe.routing import Routing
from ..training import experts

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, A, T, D], to the heads' output of that shape."""

BALANCE = (Term("switch", 0.01),)


def full(q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor) -> Tensor:
    """Return attention of every token to every token."""
    return nnf.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD)


def causal(q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor) -> Tensor:
    """Return attention of every token to itself and those before it."""
    return nnf.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=True)


class Attention(nn.Module):
    """Multi-head self-attention without biases."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def projections(self, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, each [B, A, T, D]."""
        batch, tokens, hidden = x_BTH.shape
        q, k, v = self.qkv(x_BTH).view(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x_BTH: Tensor, core: Core) -> Tensor:
        """Return y_BTH."""
        y_BATD = core(*self.projections(x_BTH))
        y_BTH: Tensor = self.out(y_BATD.transpose(1, 2).flatten(2))
        return y_BTH


class ExpertFFN(nn.Module):
    """``experts`` gated FFNs with a softmax router over them, ``k`` for each token; ``routing`` is the last Routing."""

    def __init__(self, hidden: int, width: int, experts: int, k: int) -> None:
        super().__init__()
        self.num_experts, self.k, self.act_fn = experts, k, nnf.silu
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) / math.sqrt(hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(width))
        self.routing: Routing | None = None

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y_BTH."""
        x_NH = x_BTH.flatten(0, -2)
        logits_NE = self.router(x_NH)
        probs_NE = logits_NE.softmax(-1)
        weights_NK, indices_NK = probs_NE.topk(self.k, dim=-1)
        self.routing = Routing.topk(indices_NK, weights_NK, self.num_experts, logits_NE, probs_NE)
        return experts.forward(self, x_NH, indices_NK, weights_NK).view_as(x_BTH)


class Block(nn.Module):
    """A pre-norm transformer block with an ExpertFFN."""

    def __init__(self, hidden: int, heads: int, width: int, experts: int, k: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(hidden, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
        self.attention = Attention(hidden, heads)
        self.ffn = ExpertFFN(hidden, width, experts, k)

    def forward(self, x_BTH: Tensor, core: Core) -> Tensor:
        """Return the residual stream after the block, [B, T, H]."""
        x_BTH = x_BTH + self.attention(self.attention_norm(x_BTH), core)
        y_BTH: Tensor = x_BTH + self.ffn(self.ffn_norm(x_BTH))
        return y_BTH


def routings(model: nn.Module) -> list[Routing]:
    """Return the last Routing of every ExpertFFN of ``model``, in its order."""
    return [part.routing for part in model.modules() if isinstance(part, ExpertFFN) and part.routing is not None]


def balance(found: Iterable[Routing]) -> Tensor:
    """Return the mean over layers of the Switch loss (even = 1) times its coefficient."""
    return torch.stack([total(routing, None, BALANCE) for routing in found]).mean()

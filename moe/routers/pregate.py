"""Read-ME (arXiv 2410.19123): all routes of a token are known from token ids, before the first layer runs.

The router is trained apart, on the overlap of activations with the experts' masks; its argmax passes no gradient. How a
dense FFN becomes experts is a structure and not done here.

Shape letters: T tokens, D width of the router, A its heads, C width of one head, E expert ids, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import One, RouterBundle, TopK, seeded_normal
from ..router_context import ContextPipeline, OncePerModel, ids_per_token, per_token, visible_tokens
from ..routing import Context

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.pregate import ReadMe
    from ..shapes import ModelShape

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6


class PreGate(nn.Module):
    """Scores of the experts from the ids of a token and of those before it in its sequence, in float32."""

    def __init__(self, params: ReadMe, experts: int, seed: int) -> None:
        super().__init__()

        def matrix(name: str, rows: int) -> nn.Parameter:
            return nn.Parameter(seeded_normal((rows, params.width), params.width**-0.5, seed, f"read_me.{name}"))

        self.embedding_VD = nn.Parameter(seeded_normal((params.vocabulary, params.width), 1.0, seed, "read_me.ids"))
        self.blocks = nn.ModuleList(
            CausalAttention(
                matrix(f"{block}.qkv", 3 * params.width),
                matrix(f"{block}.out", params.width),
                params.heads,
                params.normalizer,
            )
            for block in range(params.layers)
        )
        self.norm = nn.RMSNorm(params.width, eps=NORM_EPSILON)
        self.inner_DD = matrix("inner", params.width)
        self.outer_ED = matrix("outer", experts)

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE; only the number of tokens is read from ``x_TH``."""
        device = self.embedding_VD.device
        ids_T = ids_per_token(ctx, "token_ids_T", len(x_TH), len(self.embedding_VD)).to(device)
        seen_TT = visible_tokens(ctx, len(x_TH), causal=True).to(device)
        position_T = positions(ctx, len(x_TH)).to(device)
        x_TD = self.embedding_VD[ids_T]
        for block in self.blocks:
            x_TD = x_TD + block(x_TD, seen_TT, position_T)
        return nnf.linear(nnf.silu(nnf.linear(self.norm(x_TD), self.inner_DD)), self.outer_ED)


class CausalAttention(nn.Module):
    """Pre-norm attention over the tokens that may be seen, with rotary positions; logits over ``normalizer``."""

    def __init__(self, qkv: nn.Parameter, out_DD: nn.Parameter, heads: int, normalizer: float) -> None:
        super().__init__()
        self.qkv = qkv
        self.out_DD = out_DD
        self.heads = heads
        self.normalizer = normalizer
        self.norm = nn.RMSNorm(out_DD.shape[0], eps=NORM_EPSILON)

    def forward(self, x_TD: Tensor, seen_TT: Tensor, position_T: Tensor) -> Tensor:
        """Return what is added to ``x_TD``."""
        size = (len(x_TD), 3, self.heads, x_TD.shape[1] // self.heads)
        qkv_3TAC = nnf.linear(self.norm(x_TD), self.qkv).view(size).movedim(1, 0)
        query_TAC, key_TAC = rotated(qkv_3TAC[0], position_T), rotated(qkv_3TAC[1], position_T)
        logits_ATT = torch.einsum("iac,jac->aij", query_TAC, key_TAC) / self.normalizer
        attention_ATT = logits_ATT.masked_fill(~seen_TT, float("-inf")).softmax(-1)
        mixed_TAC = torch.einsum("aij,jac->iac", attention_ATT, qkv_3TAC[2])
        return nnf.linear(mixed_TAC.flatten(1), self.out_DD)


def positions(ctx: Context, tokens: int) -> Tensor:
    """Return how many tokens of its segment lie before each token, [T] int64, padding included."""
    segment_T = per_token(ctx, "segment_T", tokens)
    return (segment_T[:, None] == segment_T).tril(-1).sum(-1)


def rotated(x_TAC: Tensor, position_T: Tensor) -> Tensor:
    """Return ``x_TAC`` with channels (c, c + C/2) turned by position * base^(-2c / C) (arXiv 2104.09864)."""
    half = x_TAC.shape[-1] // 2
    rate_C = ROTARY_BASE ** (-torch.arange(half, device=x_TAC.device) / half)
    angle_T1C = position_T[:, None, None] * rate_C
    cos_T1C, sin_T1C = angle_T1C.cos(), angle_T1C.sin()
    first_TAC, second_TAC = x_TAC[..., :half], x_TAC[..., half:]
    return torch.cat([first_TAC * cos_T1C - second_TAC * sin_T1C, second_TAC * cos_T1C + first_TAC * sin_T1C], dim=-1)


def build(params: ReadMe) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory; every layer gets a router, and that of the first decides for all."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        scorer = PreGate(params, shape.experts, seed)
        router = ContextPipeline(scorer, TopK(1), One(), {"token_ids_T", "segment_T"})
        return RouterBundle(OncePerModel(router), params.kinds(shape))

    return factory

"""Graph of Tokens (arXiv 2505.00792): tokens that are alike, or attend to each other, share their probabilities.

The mixture costs 2 T^2 (H + E) FLOPs where similarity is computed here, 2 T^2 E where attention is given. When
decoding, a token needs the probabilities of all before it; here all tokens of a sequence come in one call.

Shape letters: T tokens, H hidden, E expert ids, B sequences of length L (T = B L).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..router import Linear, RouterBundle, TopK, router_rows, weighter
from ..router_context import ContextPipeline, needed, visible_tokens
from ..routing import Context

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.graph import AttentionAware, SimilarityAware
    from ..shapes import ModelShape

TINY = torch.finfo(torch.float32).tiny


class Mixed(nn.Module):
    """z_i = log sum_j M_ij p_j with p = softmax(scorer(x)): softmax of these logits is the mixture itself.

    ``mixture`` (probs_TE, x_TH, ctx) -> probs_TE applies M, whose rows sum to one.
    """

    def __init__(self, scorer: nn.Module, mixture: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer
        self.mixture = mixture

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE float32."""
        probs_TE: Tensor = self.mixture(self.scorer(x_TH, ctx).softmax(-1), x_TH, ctx)
        return probs_TE.clamp(min=TINY).log()


class Similarity(nn.Module):
    """M = softmax(x W_s x^T / temperature) over the tokens of the same sequence; W_s starts as the identity."""

    def __init__(self, hidden: int, temperature: float, causal: bool) -> None:
        super().__init__()
        self.map_HH = nn.Parameter(torch.eye(hidden))
        self.temperature = temperature
        self.causal = causal

    def forward(self, probs_TE: Tensor, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return the mixture of probs_TE."""
        x_TH = x_TH.float()
        scores_TT = x_TH @ self.map_HH @ x_TH.T / self.temperature
        hidden_TT = ~visible_tokens(ctx, len(x_TH), self.causal)
        return scores_TT.masked_fill(hidden_TT, float("-inf")).softmax(-1) @ probs_TE


class Attention(nn.Module):
    """M = the mean of the heads of ``ctx.attn`` [B, heads, L, L], renormalised over the tokens that may be seen.

    A token whose attention lies on none of them keeps its own probabilities.
    """

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, probs_TE: Tensor, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return the mixture of probs_TE."""
        attn_BALL: Tensor = needed(ctx, "attn")
        sequences, _, queries, keys = attn_BALL.shape
        if queries != keys or sequences * queries != len(probs_TE):
            raise ValueError(
                f"the Context's 'attn' has {sequences} x {queries} queries and {keys} keys for {len(probs_TE)} tokens; "
                "give the whole attention of these sequences."
            )
        mixing_BLL = attn_BALL.float().mean(1)
        if self.causal:
            mixing_BLL = mixing_BLL.tril()
        if ctx.valid_T is not None:
            mixing_BLL = mixing_BLL * ctx.valid_T.reshape(sequences, 1, keys)
        seen_BL1 = mixing_BLL.sum(-1, keepdim=True)
        alone_LL = torch.eye(keys, device=mixing_BLL.device)
        mixing_BLL = torch.where(seen_BL1 > 0, mixing_BLL / seen_BL1.clamp(min=TINY), alone_LL)
        mixed_BLE: Tensor = mixing_BLL @ probs_TE.reshape(sequences, keys, probs_TE.shape[1])
        return mixed_BLE.flatten(0, 1)


def build_similarity(params: SimilarityAware) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of similarity-aware routing."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        temperature = shape.hidden**0.5 if params.temperature is None else params.temperature
        mixture = Similarity(shape.hidden, temperature, params.causal)
        return _bundle(params, mixture, "segment_T", weights, shape, seed)

    return factory


def build_attention(params: AttentionAware) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of attention-aware routing."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        return _bundle(params, Attention(params.causal), "attn", weights, shape, seed)

    return factory


def _bundle(
    params: SimilarityAware | AttentionAware,
    mixture: nn.Module,
    need: str,
    weights: LayerWeights,
    shape: ModelShape,
    seed: int,
) -> RouterBundle:
    selection = params.selection(shape)
    scorer = Mixed(Linear(router_rows(weights, shape, seed)), mixture)
    router = ContextPipeline(scorer, TopK(selection.k), weighter(selection), {need}, params.causal)
    return RouterBundle(router, params.kinds(shape))

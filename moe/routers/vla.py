"""AdaMoE-VLA (arXiv 2510.14300): the router chooses experts, a second linear map adds to their weights.

Shape letters: T tokens, H hidden, E expert ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..router import Linear, Router, RouterBundle, router_rows, seeded_normal, top_k
from ..routing import Context, Routing
from .shared import shared_expert

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.vla import AdaMoEVLA
    from ..shapes import ModelShape


class ScaleAdapter(Router):
    """Top-k of p = softmax(z) whose weights are p + x W_s; they may be negative and sum to anything."""

    def __init__(self, scorer: nn.Module, k: int, adapter: Linear) -> None:
        super().__init__()
        self.scorer = scorer
        self.k = k
        self.adapter = adapter

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``; its probabilities are p, which the adapter has no part in."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        probs_TE = logits_TE.float().softmax(-1)
        experts = logits_TE.shape[1]
        indices_TK = top_k(probs_TE.detach(), self.k)
        weights_TK = self.weights(x_TH, probs_TE, ctx).gather(1, indices_TK)
        if ctx.valid_T is not None:
            indices_TK = indices_TK.masked_fill(~ctx.valid_T[:, None], experts)
        return Routing.topk(indices_TK, weights_TK, experts, logits_TE, probs_TE)

    def weights(self, x_TH: Tensor, probs_TE: Tensor, ctx: Context) -> Tensor:
        """Return the weight that every expert would have, [T, E]."""
        added_TE: Tensor = self.adapter(x_TH, ctx)
        return probs_TE + added_TE


class ConcatAdapter(ScaleAdapter):
    """The same choice with weights softmax([x; p] W_cs) over all experts (CSMoE)."""

    def weights(self, x_TH: Tensor, probs_TE: Tensor, ctx: Context) -> Tensor:
        """Return the weight that every expert would have, [T, E]."""
        mixed_TE: Tensor = self.adapter(torch.cat([x_TH.float(), probs_TE], dim=-1), ctx)
        return mixed_TE.softmax(-1)


def build(params: AdaMoEVLA) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the router with its adapter."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        concat = params.adapter == "concat"
        inputs = shape.hidden + shape.experts if concat else shape.hidden
        adapter = Linear(seeded_normal((shape.experts, inputs), params.std * inputs**-0.5, seed, "vla.adapter"))
        kind = ConcatAdapter if concat else ScaleAdapter
        router = kind(Linear(router_rows(weights, shape, seed)), params.k, adapter)
        return RouterBundle(router, kinds, shared=shared_expert(params.shared, weights, shape, seed))

    return factory

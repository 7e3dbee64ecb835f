"""Top-p routing (arXiv 2403.07652): as many experts as it takes to hold a share of the probability.

Shape letters: T tokens, H hidden, E expert ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..router import Linear, Router, RouterBundle, router_rows
from ..router_parts import masked_routing
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.nucleus import TopP
    from ..shapes import ModelShape


def nucleus(probs_TE: Tensor, share: float) -> Tensor:
    """Return keep_TE bool: the fewest experts of each token whose probabilities add up to at least ``share``.

    They are never more than ceil(share E), which the rounding of a sum could exceed.
    """
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True)
    keep_TE = sorted_TE.cumsum(-1) - sorted_TE < share
    keep_TE[:, math.ceil(share * probs_TE.shape[1]) :] = False
    return torch.zeros_like(keep_TE).scatter(1, order_TE, keep_TE)


class Nucleus(Router):
    """The fewest experts that hold the share ``p`` of softmax(z), weighted by it or by their part of it."""

    def __init__(self, scorer: nn.Module, p: float, renormalize: bool) -> None:
        super().__init__()
        self.scorer = scorer
        self.p = p
        self.renormalize = renormalize

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        probs_TE = logits_TE.float().softmax(-1)
        keep_TE = nucleus(probs_TE.detach(), self.p)
        gate_TE = probs_TE
        if self.renormalize:
            gate_TE = probs_TE / (probs_TE * keep_TE).sum(-1, keepdim=True)
        return masked_routing(gate_TE, keep_TE, ctx, logits_TE, probs_TE)


def build(params: TopP) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the router."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        router = Nucleus(Linear(router_rows(weights, shape, seed)), params.p, params.renormalize)
        return RouterBundle(router, params.kinds(shape))

    return factory

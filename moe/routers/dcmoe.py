"""DCMoE (Uni-MoE, arXiv 2510.13344): top-p over dynamic and null experts beside fixed ones.

Shape letters: T tokens, H hidden, E expert ids, D ids that compete, M null experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..router import Linear, Router, RouterBundle, grown_rows
from ..router_parts import masked_routing
from ..routing import Context, Routing
from .nucleus import nucleus

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.dcmoe import DCMoE
    from ..shapes import ModelShape

NEAR = 0.02
"""Scores that lie within this part of the best count as near it: twice the jitter of 0.01 of the released code."""


class DynamicCapacity(Router):
    """The fewest competing experts that hold the share ``p``, and the fixed ones, under one softmax of their logits.

    ``fixed_E`` and ``zero_E`` say which ids are always on, and which are null experts: these have no entries.
    Probabilities are the softmax over the ids that compete, 0 at the fixed ones.
    """

    fixed_E: Tensor
    zero_E: Tensor

    def __init__(self, scorer: nn.Module, p: float, fixed_E: Tensor, zero_E: Tensor, released_weights: bool) -> None:
        super().__init__()
        self.scorer = scorer
        self.p = p
        self.released_weights = released_weights
        self.register_buffer("fixed_E", fixed_E)
        self.register_buffer("zero_E", zero_E)

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        logits_TE = self.scorer(x_TH, ctx).float()
        probs_TE = logits_TE.masked_fill(self.fixed_E, float("-inf")).softmax(-1)
        drawn_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
        drawn_TE[:, ~self.fixed_E] = nucleus(probs_TE[:, ~self.fixed_E].detach(), self.p)
        gate_TE = logits_TE.masked_fill(~(drawn_TE | self.fixed_E), float("-inf")).softmax(-1)
        if self.released_weights:
            dynamic_T1 = (gate_TE * drawn_TE).sum(-1, keepdim=True)
            mixed_TE = mixer_weights(logits_TE.masked_fill(self.fixed_E, float("-inf")), drawn_TE) * dynamic_T1
            gate_TE = torch.where(self.fixed_E, gate_TE, mixed_TE)
        return masked_routing(gate_TE, (drawn_TE | self.fixed_E) & ~self.zero_E, ctx, logits_TE, probs_TE)


def mixer_weights(scores_TE: Tensor, drawn_TE: Tensor) -> Tensor:
    """Return weights of the drawn experts that sum to one: what a SparseMixer without noise gives them.

    From the best on, each has the softmax over itself and those after it whose distance to it is at most NEAR of the
    larger of both magnitudes.
    """
    weight_TE, rest_TE = torch.zeros_like(scores_TE), scores_TE
    for _ in range(int(drawn_TE.sum(-1).max()) if len(drawn_TE) else 0):
        best = rest_TE.max(-1, keepdim=True)
        larger_TE = torch.maximum(scores_TE.abs(), best.values.abs())
        far_TE = ((best.values - scores_TE) / larger_TE).detach() > NEAR
        chance_TE = rest_TE.masked_fill(far_TE, float("-inf")).softmax(-1)
        weight_TE = weight_TE.scatter(1, best.indices, chance_TE.gather(1, best.indices))
        rest_TE = rest_TE.scatter(1, best.indices, float("-inf"))
    weight_TE = weight_TE * drawn_TE
    return weight_TE / weight_TE.sum(-1, keepdim=True)


def build(params: DCMoE) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory: the layer's own router rows, and seeded ones for the null experts behind them."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        rows_EH = grown_rows(weights, shape, seed, params.null, "dcmoe.null")
        fixed_E = torch.zeros(len(kinds), dtype=torch.bool)
        fixed_E[shape.experts - params.fixed : shape.experts] = True
        zero_E = torch.tensor([kind == "zero" for kind in kinds])
        router = DynamicCapacity(Linear(rows_EH), params.p, fixed_E, zero_E, params.released_weights)
        return RouterBundle(router, kinds)

    return factory

"""Every expert with a positive logit: ReMoE (arXiv 2412.14711) and BlockFFN (arXiv 2507.08771).

Shape letters: T tokens, H hidden, E expert ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..router import Linear, Router, RouterBundle, router_rows
from ..router_parts import masked_routing
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.positive import BlockFFN, ReMoE
    from ..shapes import ModelShape


class RMSNorm(nn.Module):
    """a = r / sqrt(mean_e r_e^2 + epsilon) * gain, in float32."""

    def __init__(self, experts: int, epsilon: float) -> None:
        super().__init__()
        self.gain_E = nn.Parameter(torch.ones(experts))
        self.epsilon = epsilon

    def forward(self, value_TE: Tensor) -> Tensor:
        """Return the normalised values [T, E]; a row of zeros stays one."""
        return value_TE * torch.rsqrt(value_TE.square().mean(-1, keepdim=True) + self.epsilon) * self.gain_E


class Positive(Router):
    """Every expert with z > 0, weighted by ReLU(z), through a norm where one is given.

    The Routing's probabilities are these values for all experts; they do not sum to one.
    """

    def __init__(self, scorer: nn.Module, norm: RMSNorm | None = None) -> None:
        super().__init__()
        self.scorer = scorer
        self.norm = norm

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        gate_TE = logits_TE.relu()
        if self.norm is not None:
            gate_TE = self.norm(gate_TE)
        return masked_routing(gate_TE, logits_TE > 0, ctx, logits_TE, gate_TE)


def build_blockffn(params: BlockFFN) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of BlockFFN's router."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        norm = RMSNorm(shape.experts, params.epsilon)
        return RouterBundle(Positive(Linear(router_rows(weights, shape, seed)), norm), params.kinds(shape))

    return factory


def build_remoe(params: ReMoE) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of ReMoE's router."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        return RouterBundle(Positive(Linear(router_rows(weights, shape, seed))), params.kinds(shape))

    return factory

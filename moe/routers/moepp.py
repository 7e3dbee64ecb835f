"""MoE++ (arXiv 2410.07348): zero, copy and constant experts beside the FFNs, and a gating residual between layers.

Shape letters: T tokens, H hidden, E expert ids, K slots, C constant experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..experts import Constants
from ..router import EPSILON, MLP, Linear, Pipeline, Residual, RouterBundle, Softmax, TopK, grown_rows, seeded_normal
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..plugins import MoEPlusPlus
    from ..shapes import ModelShape


class UnitSoftmax(Softmax):
    """Softmax of logits divided by their standard deviation over the experts of each token."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return softmax(z / std(z))."""
        logits_TE = logits_TE.float()
        centred_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
        variance_T1 = centred_TE.square().sum(-1, keepdim=True) / max(logits_TE.shape[1] - 1, 1)
        smallest = torch.finfo(torch.float32).tiny  # equal logits have no deviation, and stay equal
        return (centred_TE * variance_T1.clamp(min=smallest).rsqrt()).softmax(-1)


class NullTopK(Pipeline):
    """Top-k of softmax where a zero expert takes a slot and no weight: the other slots' weights sum to ``scale``.

    ``zero_E`` is true at the zero experts. Their entries are left out of the Routing; its probabilities keep them.
    ``times_E`` multiplies the weights of each id in the end.
    """

    zero_E: Tensor
    times_E: Tensor | None

    def __init__(
        self,
        scorer: nn.Module,
        k: int,
        zero_E: Tensor,
        scale: float,
        weighter: Softmax | None = None,
        times_E: Tensor | None = None,
    ) -> None:
        super().__init__(scorer, TopK(k), Softmax() if weighter is None else weighter)
        self.register_buffer("zero_E", zero_E)
        self.register_buffer("times_E", times_E)
        self.scale = scale
        if isinstance(scorer, Residual):
            self.needs = frozenset({"prev"})

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``; ``logits_TE`` include the residual, for the layer after this one."""
        routing = super().forward(x_TH, ctx)
        routing = routing.keep(~self.zero_E[routing.expert_N])
        total_T = routing.weight_N.new_zeros(routing.num_tokens).index_add(0, routing.token_N, routing.weight_N)
        routing = routing.scaled(self.scale / (total_T[routing.token_N] + EPSILON))
        return routing if self.times_E is None else routing.scaled(self.times_E[routing.expert_N])


def build(params: MoEPlusPlus) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the router and its constant experts."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        scorer = _scorer(params, weights, shape, seed, len(kinds))
        zero_E = torch.tensor([kind == "zero" for kind in kinds])
        weighter = UnitSoftmax() if params.unit_logits else Softmax()
        constants = _constants(params.constant, shape.hidden, seed)
        if not params.released_inputs:
            return RouterBundle(NullTopK(scorer, params.k, zero_E, params.scale, weighter), kinds, constants)
        times_E = torch.tensor([1.0 if kind == "ffn" else float(params.k) for kind in kinds])
        router = NullTopK(scorer, params.k, zero_E, params.scale, weighter, times_E)
        return RouterBundle(router, kinds, _times_inputs(constants, params.k), input_scale=float(params.k))

    return factory


def _times_inputs(constants: Constants | None, times: int) -> Constants | None:
    """Return constants that give f(times x) / times: the entries of copies and constants weigh ``times`` as much."""
    return None if constants is None else Constants(constants.gate_C2H * times, constants.value_CH / times)


def _scorer(params: MoEPlusPlus, weights: LayerWeights, shape: ModelShape, seed: int, experts: int) -> nn.Module:
    """Return the scorer over all expert ids; the two-layer one is seeded whole, since no model's router fits it."""
    hidden = shape.hidden
    scorer: nn.Module
    if params.scorer == "mlp":
        inner_DH = seeded_normal((8 * experts, hidden), hidden**-0.5, seed, "moepp.inner")
        scorer = MLP(inner_DH, seeded_normal((experts, 8 * experts), (8 * experts) ** -0.5, seed, "moepp.outer"))
    else:
        scorer = Linear(grown_rows(weights, shape, seed, experts - shape.experts, "moepp.rows"))
    if not params.residual:
        return scorer
    return Residual(scorer, seeded_normal((experts, experts), experts**-0.5, seed, "moepp.residual"))


def _constants(count: int, hidden: int, seed: int) -> Constants | None:
    """Return W_c [C, 2, H] with std 1 / sqrt(H) and v [C, H] ~ N(0, 1), or None without constant experts."""
    if count == 0:
        return None
    gate_C2H = seeded_normal((count, 2, hidden), hidden**-0.5, seed, "moepp.gate")
    return Constants(gate_C2H, seeded_normal((count, hidden), 1.0, seed, "moepp.value"))

"""Routers to measure others by: ``oracle`` runs every expert and takes those that matter, ``random`` draws.

Shape letters: T tokens, H hidden, E expert ids, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layer import expert_output
from ..router import Linear, Router, RouterBundle, Weighter, router_rows, weighter
from ..router_context import needed
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..experts import ExpertStore
    from ..layer import LayerWeights
    from ..router_params.oracle import Oracle as OracleParams
    from ..router_params.oracle import OwnWeights
    from ..router_params.oracle import Random as RandomParams
    from ..shapes import ModelShape


class Chosen(Router):
    """``k`` experts whose ranks a subclass says, with the weights that the layer's own scorer and rule give them."""

    def __init__(self, scorer: nn.Module, weigh: Weighter, k: int) -> None:
        super().__init__()
        self.scorer, self.weigh, self.k = scorer, weigh, k

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``, the highest rank first; logits are the own scorer's."""
        logits_TE = self.scorer(x_TH, ctx)
        scores_TE = self.weigh.scores(logits_TE)
        with torch.no_grad():
            indices_TK = self.ranks(x_TH, self.weigh.unscaled(scores_TE), ctx).topk(self.k, dim=-1).indices
        weights_TK = self.weigh(scores_TE, indices_TK)
        experts = logits_TE.shape[1]
        if ctx.valid_T is not None:
            indices_TK = indices_TK.masked_fill(~ctx.valid_T[:, None], experts)
        return Routing.topk(indices_TK, weights_TK, experts, logits_TE, self.weigh.probabilities(scores_TE))

    def ranks(self, x_TH: Tensor, gate_TE: Tensor, ctx: Context) -> Tensor:
        """Return ranks_TE, the best highest; ``gate_TE`` are the weights of all experts were none left out."""
        raise NotImplementedError


class Oracle(Chosen):
    """Ranks are contributions to the sum over all experts."""

    needs = frozenset({"experts"})

    def ranks(self, x_TH: Tensor, gate_TE: Tensor, ctx: Context) -> Tensor:
        """Return g_e f_e(x) . y in float32."""
        return contributions(needed(ctx, "experts"), x_TH, gate_TE)


class Random(Chosen):
    """Ranks are drawn."""

    needs = frozenset({"rng"})

    def ranks(self, x_TH: Tensor, gate_TE: Tensor, ctx: Context) -> Tensor:
        """Return uniform numbers of ``ctx.rng``."""
        rng = needed(ctx, "rng")
        return torch.rand(gate_TE.shape, generator=rng, device=rng.device).to(x_TH.device)


def contributions(store: ExpertStore, x_TH: Tensor, gate_TE: Tensor) -> Tensor:
    """Return g_e f_e(x) . y with y = sum_e g_e f_e(x), [T, E] float32; every expert runs twice, none is kept."""

    def terms() -> Iterator[Tensor]:
        for expert in range(store.num_experts):
            yield expert_output(x_TH, store, expert).float() * gate_TE[:, expert, None]

    y_TH = torch.zeros(x_TH.shape, device=x_TH.device)
    for term_TH in terms():
        y_TH += term_TH
    return torch.stack([(term_TH * y_TH).sum(dim=1) for term_TH in terms()], dim=1)


def build_oracle(params: OracleParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the oracle."""
    return _factory(params, Oracle)


def build_random(params: RandomParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the random router; chance comes from ``ctx.rng`` alone."""
    return _factory(params, Random)


def _factory(params: OwnWeights, router: type[Chosen]) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        rule = params.rule(shape)
        scorer = Linear(router_rows(weights, shape, seed))
        return RouterBundle(router(scorer, weighter(rule), rule.k), params.kinds(shape))

    return factory

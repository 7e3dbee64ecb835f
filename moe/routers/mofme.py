"""MoFME (arXiv 2312.16610): weights calibrated by the router's own uncertainty, and experts that modulate features.

A feature-modulating expert (FiLM) is f_e(h) = (A_e h) * h + B_e h for features h of a trunk that all experts share, so
that mixing the maps first gives what mixing the outputs gives.

Shape letters: T tokens, H hidden, E expert ids, M passes, N assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..layer import assignments
from ..router import Linear, RouterBundle, TopK, Weighter, router_rows, weighter
from ..router_context import ContextPipeline, needed
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.mofme import MoFME
    from ..shapes import ModelShape

VARIANCE_FLOOR = 1e-5
"""Added to a variance before its root is taken, as the released code adds it to the covariance."""


class Uncertain(ContextPipeline):
    """Top-k whose weights r become (r - mean) / sqrt(variance + floor) of ``passes`` dropout passes in training.

    Mean and variance carry no gradient: a weight's gradient is that of r over its uncertainty.
    """

    def __init__(self, scorer: nn.Module, selector: TopK, weighter: Weighter, passes: int, dropout: float) -> None:
        super().__init__(scorer, selector, weighter, {"rng"})
        self.passes = passes
        self.dropout = dropout

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``; in training with weights in units of their uncertainty."""
        routing = super().forward(x_TH, ctx)
        if not ctx.training:
            return routing
        gate_MTE = torch.stack([self._dropout_pass(x_TH, ctx) for _ in range(self.passes)])
        mean_TE = gate_MTE.mean(0)
        variance_TE = (gate_MTE - mean_TE).square().sum(0) / (self.passes - 1)
        entry = (routing.token_N, routing.expert_N)
        deviation_N = routing.weight_N - mean_TE[entry]
        return replace(routing, weight_N=deviation_N * torch.rsqrt(variance_TE[entry] + VARIANCE_FLOOR))

    @torch.no_grad()
    def _dropout_pass(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return the weights, [T, E], of the router on an input of which a random part is left out."""
        if self.dropout:
            rng: torch.Generator = needed(ctx, "rng")
            kept_TH = torch.rand(x_TH.shape, generator=rng, device=rng.device) >= self.dropout
            x_TH = x_TH * kept_TH.to(x_TH) / (1 - self.dropout)
        return super().forward(x_TH, ctx).to_dense()


def build(params: MoFME) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the uncertainty-aware router."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        scorer = Linear(router_rows(weights, shape, seed))
        router = Uncertain(scorer, TopK(selection.k), weighter(selection), params.passes, params.dropout)
        return RouterBundle(router, params.kinds(shape))

    return factory


# --- experts that modulate features ----------------------------------------------------------------------------------


def film_apart(h_TH: Tensor, scale_EHH: Tensor, shift_EHH: Tensor, routing: Routing) -> Tensor:
    """Return sum_e G_te ((A_e h) * h + B_e h), expert by expert."""
    y_TH = torch.zeros_like(h_TH)
    for expert, token_N, weight_N in assignments(routing):
        h_NH = h_TH[token_N]
        out_NH = nnf.linear(h_NH, scale_EHH[expert]) * h_NH + nnf.linear(h_NH, shift_EHH[expert])
        y_TH = y_TH.index_add(0, token_N, out_NH * weight_N[:, None])
    return y_TH


def film_merged(h_TH: Tensor, scale_EHH: Tensor, shift_EHH: Tensor, routing: Routing) -> Tensor:
    """Return the same with the maps of each token mixed first: (sum_e G_te A_e) h * h + (sum_e G_te B_e) h.

    It pays where a map is a vector or tokens share a mixture: one mixed map of H x H per token is a lot to hold.
    """
    gate_TE = routing.to_dense()
    scale_THH = torch.einsum("te,eij->tij", gate_TE, scale_EHH)
    shift_THH = torch.einsum("te,eij->tij", gate_TE, shift_EHH)
    return torch.einsum("tij,tj->ti", scale_THH, h_TH) * h_TH + torch.einsum("tij,tj->ti", shift_THH, h_TH)

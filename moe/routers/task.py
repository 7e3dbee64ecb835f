"""M3ViT (arXiv 2210.14793): one linear gate per task, optionally over a slice of the experts.

Its loss, cv^2 of importance plus cv^2 of load, is no part of the router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..router import RouterBundle, TopK, weighter
from ..router_context import ContextPipeline, PerContext, needed, rows_per_context, visible_experts
from ..routing import Context

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.task import M3ViT
    from ..shapes import ModelShape


class Noisy(nn.Module):
    """z = scorer(x) + N(0, std^2) from ``ctx.rng`` in training, and scorer(x) otherwise."""

    def __init__(self, scorer: nn.Module, std: float) -> None:
        super().__init__()
        self.scorer = scorer
        self.std = std

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        if not ctx.training:
            return logits_TE
        rng: torch.Generator = needed(ctx, "rng")
        noise_TE = torch.randn(logits_TE.shape, generator=rng, device=rng.device)
        return logits_TE + self.std * noise_TE.to(logits_TE.device)


def build(params: M3ViT) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory; every gate starts as the layer's own router where it has one."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        visible_GE = visible_experts(shape.experts, params.slices(shape))
        scorer: nn.Module = PerContext("task", rows_per_context(weights, shape, seed, params.tasks), visible_GE)
        needs = {"task"}
        if params.noise_std:
            scorer = Noisy(scorer, params.noise_std / params.available(shape))
            needs.add("rng")
        router = ContextPipeline(scorer, TopK(selection.k), weighter(selection), needs)
        return RouterBundle(router, params.kinds(shape))

    return factory

"""MoIIE (arXiv 2508.09779): a gate per modality over its own experts and those that both share.

Its loss is Switch's for each gate alone, and no part of the router. Uni-MoE routes as Mixtral does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..router import RouterBundle, TopK, weighter
from ..router_context import ContextPipeline, PerContext, per_token, rows_per_context, visible_experts
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.modality import MoIIE
    from ..shapes import ModelShape

VISION = 1
"""The modality id of vision; language is 0."""


class ShrunkImages(ContextPipeline):
    """The released MoIIE: a token is vision only where the token after it is, so it looks one token ahead."""

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        modality_T = shrink_images(per_token(ctx, "modality_T", len(x_TH)))
        return super().forward(x_TH, replace(ctx, modality_T=modality_T))


def shrink_images(modality_T: Tensor) -> Tensor:
    """Return the modality with the last vision token before language as language; the last of all keeps its own."""
    vision_T = modality_T == VISION
    ends_T = vision_T.clone()
    ends_T[:-1] &= ~vision_T[1:]
    ends_T[-1:] = False
    return modality_T.masked_fill(ends_T, 1 - VISION)


def build(params: MoIIE) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory; both gates start as the layer's own router where it has one."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        visible_GE = visible_experts(shape.experts, params.visible(shape))
        scorer = PerContext("modality_T", rows_per_context(weights, shape, seed, len(visible_GE)), visible_GE)
        kind = ShrunkImages if params.released_boundary else ContextPipeline
        router = kind(
            scorer,
            TopK(selection.k),
            weighter(selection),
            needs={"modality_T"},
            causal=not params.released_boundary,
        )
        return RouterBundle(router, params.kinds(shape))

    return factory

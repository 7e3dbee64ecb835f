"""Named systems whose router is top-k of softmax, with the shared expert that goes with it.

Shape letters: T tokens, H hidden, E expert ids, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..router import Linear, RouterBundle, TopK, router_rows, weighter
from ..router_context import ContextPipeline, number_segments
from ..routing import Context
from . import topk
from .shared import shared_expert

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.presets import Preset, RobustQA
    from ..shapes import ModelShape


def build(params: Preset) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the router, with a shared expert where the system has one and the layer has none."""
    router_of = topk.build(params)

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        return replace(router_of(weights, shape, seed), shared=shared_expert(params.shared, weights, shape, seed))

    return factory


class FirstToken(nn.Module):
    """The scores of the first valid token of its sequence, for every token: z_t = scorer(x)_first(t)."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        segment_T, segments = number_segments(ctx, len(x_TH))
        last = max(len(x_TH) - 1, 0)
        place_T = torch.arange(len(x_TH), device=segment_T.device)
        if ctx.valid_T is not None:
            place_T = place_T.masked_fill(~ctx.valid_T, last)
        first_S = place_T.new_full((segments,), last).scatter_reduce(0, segment_T, place_T, "amin")
        logits_SE: Tensor = self.scorer(x_TH[first_S], ctx)
        return logits_SE[segment_T]


def build_robust_qa(params: RobustQA) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory: a switch, whose logits are those of the sequence's first token where the gate says so."""
    if params.gate == "token":
        return build(params)

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        scorer = FirstToken(Linear(router_rows(weights, shape, seed)))
        router = ContextPipeline(scorer, TopK(selection.k), weighter(selection), {"segment_T"})
        return RouterBundle(router, params.kinds(shape))

    return factory

"""Transforms as structures of a recipe. Shape letters: T tokens, H hidden, E experts."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..layer import LayerWeights
from ..structure import StructureStep
from .aggregate import aggregate
from .params import Aggregate, Prune, Upcycle
from .prune import at_random, by_utilisation, prune
from .upcycle import upcycle


def pruned(params: Prune) -> StructureStep:
    """Structure ``prune``: the busiest experts on the calibration tokens, or some at random."""

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        keep = params.kept(len(weights.down))
        if params.by == "random":
            return prune(weights, at_random(len(weights.down), keep, seed))
        return prune(weights, by_utilisation(utilisation(weights, activations_TH, params.top), keep))

    return build


def utilisation(weights: LayerWeights, x_TH: Tensor, top: int) -> Tensor:
    """Return how many tokens have each expert among their ``top`` best by the layer's own gate, [E] int64.

    Softmax and sigmoid keep the order of logits; a selection bias is added to sigmoid scores, as DeepSeek-V3 does.
    """
    if weights.router_EH is None:
        raise ValueError("the layer has no gate whose choices could be counted; use params.structure.prune.by=random.")
    if len(x_TH) == 0:
        raise ValueError("utilisation is counted on tokens and got none; ask for calibration tokens.")
    scores_TE = nnf.linear(x_TH.float(), weights.router_EH.float())
    if weights.router_bias_E is not None:
        scores_TE = scores_TE.sigmoid() + weights.router_bias_E
    chosen_TK = scores_TE.topk(top, dim=-1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=scores_TE.shape[1])


def aggregated(params: Aggregate) -> StructureStep:
    """Structure ``aggregate``: the layer and its copy."""
    return lambda weights, activations_TH, seed: aggregate(weights, weights)


def upcycled(params: Upcycle) -> StructureStep:
    """Structure ``upcycle``: copies of the dense FFN."""
    return lambda weights, activations_TH, seed: upcycle(weights, params.experts, seed, params.noise)

"""What the parameter classes of smoothing do to a layer. Shape letters: T tokens, H hidden, E experts, K slots."""

from __future__ import annotations

from torch import Tensor

from ..codecs.integer import IntTensor
from ..codecs.rtn import round_to_nearest
from ..layer import LayerWeights
from .params import RouterQuantization, Smoothing
from .router import aligned_router
from .scales import Folded, LayerStats, expert_aware_scale, fold_input, naive_scale, router_scale, smooth_hidden

SCALES = {"experts": expert_aware_scale, "input": naive_scale, "router": router_scale}


def smoothed(params: Smoothing, weights: LayerWeights, stats: LayerStats) -> Folded:
    """Return the smoothed layer, and the factor of its inputs.

    Smoothing the inputs leaves the hidden channels as they were, so that ``stats`` serve for both.
    """
    folded = fold_input(weights, SCALES[params.by](weights, stats, params.alpha))
    if not params.hidden:
        return folded
    return Folded(smooth_hidden(folded.weights, stats, params.alpha), folded.input_scale_H)


def quantized_router(params: RouterQuantization, router_EH: Tensor, x_TH: Tensor, k: int) -> IntTensor:
    """Return the router's packed weight, calibrated on ``x_TH`` for top-``k`` where the parameters say so."""
    if params.align:
        return aligned_router(router_EH, x_TH, k, params.scheme()).weight
    return round_to_nearest(router_EH, params.scheme())

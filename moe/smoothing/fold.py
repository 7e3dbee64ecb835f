"""The fold stage of a recipe for EAQuant: a layer smoothed before it is quantized, and its gate rounded.

Shape letters: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..bits.calibration import calibrate_routed, channel_stats
from ..experts import ExpertStore
from ..fold_stage import FoldedLayer
from ..layer import LayerWeights, ffn_hidden, scaled_input
from ..routing import Routing
from .params import EAQuant, RouterQuantization, Smoothing
from .scales import Folded, LayerStats, smooth_hidden
from .steps import quantized_router, smoothed
from .traffic import Traffic, traffic_of


def fold(params: EAQuant, weights: LayerWeights, routing: Routing, x_TH: Tensor, k: int, seed: int) -> FoldedLayer:
    """Return the layer smoothed, and its gate rounded, as ``params`` say.

    ``x_TH`` float32 are calibration inputs of the layer and ``routing`` what its router makes of them, at most ``k``
    experts for a token.
    """
    before_H = _ones(weights) if weights.input_scale_H is None else weights.input_scale_H
    read_TH = scaled_input(x_TH, before_H)
    traffic = traffic_of(params, routing, read_TH, seed)
    inner = replace(weights, router_EH=_over(weights.router_EH, before_H), input_scale_H=None)
    made = _smoothed(params, inner, traffic)
    scale_H = before_H * made.input_scale_H
    folded = replace(made.weights, router_EH=weights.router_EH, input_scale_H=scale_H)
    short = len(traffic.short) if params.balance else None
    if params.router is None:
        return FoldedLayer(folded, None, short)
    rows_EH = made.weights.router_EH
    if rows_EH is None:
        raise ValueError("the layer has no gate of its own to round; use params.quantization.eaquant.router=null.")
    ordinary_TH = traffic.parts[0][1]
    gate = quantized_router(
        RouterQuantization(params.router, params.align), rows_EH, scaled_input(ordinary_TH, made.input_scale_H), k
    )
    router_EH = (gate.dequantize(torch.float64) * scale_H).float()
    return FoldedLayer(replace(folded, router_EH=router_EH), gate, short)


def _smoothed(params: EAQuant, weights: LayerWeights, traffic: Traffic) -> Folded:
    """Return the layer smoothed by what its experts read in ``traffic``."""
    if params.smoothing == "none" and not params.hidden:
        return Folded(weights, _ones(weights))
    stats = _stats(weights, traffic)
    if params.smoothing == "none":
        return Folded(smooth_hidden(weights, stats, params.alpha), _ones(weights))
    return smoothed(Smoothing(params.smoothing, params.alpha, params.hidden), weights, stats)


def _stats(weights: LayerWeights, traffic: Traffic) -> LayerStats:
    kinds = ("ffn",) * len(weights.down)
    store = ExpertStore(weights.gate_up, weights.down, kinds, weights.activation, weights.gated)
    known = calibrate_routed(store, traffic.parts, moments=False)
    x_TH, shared = traffic.parts[0][1], weights.shared
    every_T = x_TH.new_ones(len(x_TH))
    hidden = None
    if shared is not None:
        hidden_TS = ffn_hidden(x_TH, shared.gate_up.to(x_TH.dtype), shared.activation, shared.gated)
        hidden = channel_stats(hidden_TS, every_T, moments=False)
    return LayerStats(known.gate_up, channel_stats(x_TH, every_T), known.down, hidden)


def _ones(weights: LayerWeights) -> Tensor:
    return torch.ones(weights.gate_up.shape[-1], dtype=torch.float64)


def _over(router_EH: Tensor | None, scale_H: Tensor) -> Tensor | None:
    """Return the gate of inputs that took ``scale_H``."""
    return None if router_EH is None else router_EH.to(scale_H.dtype) / scale_H

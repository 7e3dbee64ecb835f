"""What the parameter classes of smoothing do to a layer. Shape letters: T tokens, H hidden, E experts, K slots."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..bits.calibration import calibrate_routed
from ..codecs import gptq
from ..codecs.integer import IntTensor
from ..codecs.rtn import round_to_nearest
from ..experts import ExpertStore
from ..layer import LayerWeights
from ..quantization import Encoder, QuantizationStep, Seen, dense_weights, encoded, encoder
from ..router import seeded_normal
from ..structure import StructureStep
from .params import EAQuant, Outliers, RouterQuantization, Smoothing
from .router import aligned_router
from .scales import (
    Folded,
    LayerStats,
    expert_aware_scale,
    fold_input,
    inject_outliers,
    naive_scale,
    router_scale,
    smooth_hidden,
)
from .traffic import traffic_of

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


def eaquant(params: EAQuant) -> QuantizationStep:
    """Return the step that packs the experts of a layer that ``fold`` has smoothed."""

    def step(store: ExpertStore, seen: Seen | None) -> ExpertStore:
        if seen is None:
            raise ValueError("a layer is smoothed by what its experts read; calibrate it first.")
        weights, known = dense_weights(store, params.scheme()), None
        if params.codec == "gptq":
            routing = seen.router(seen.x_TH, seen.ctx)
            known = calibrate_routed(store, traffic_of(params, routing, seen.x_TH, seen.seed).parts)
        return encoded(store, weights, [_encoder(params)] * len(store.ffn_ids), known)

    return step


def _encoder(params: EAQuant) -> Encoder:
    if params.codec == "rtn":
        return encoder(params)
    how = params.weights()
    return lambda weight, stats: replace(gptq.encode(weight, how, stats), scheme=params.scheme())  # type: ignore[arg-type]


def outliers(params: Outliers) -> StructureStep:
    """Structure ``outliers``: seeded channels of the inputs made larger; the router reads them as they were."""

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        order_H = seeded_normal((weights.gate_up.shape[-1],), 1.0, seed, "outliers").argsort()
        made = inject_outliers(weights, order_H[: params.channels].tolist(), params.factor)
        return replace(made.weights, router_EH=weights.router_EH, input_scale_H=made.input_scale_H)

    return build

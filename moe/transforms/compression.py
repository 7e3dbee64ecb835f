"""Slimming and merging as structures of a recipe. Shape letters: T tokens, H hidden, E experts, F channels."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from ..layer import LayerWeights
from ..routing import Routing
from ..structure import StructureStep
from .compression_params import Merge, Slim
from .merge import expert_outputs, group_experts, merge
from .slim import best_channels, chances, layer_gradient, magnitudes, slim, taylor_terms
from .steps import utilisation


def slimmed(params: Slim) -> StructureStep:
    """Structure ``slim``: every expert keeps its best channels by the layer's own loss, by magnitude, or by chance."""

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        return slim(weights, best_channels(_scores(params, weights, activations_TH, seed), _width(params, weights)))

    return build


def _width(params: Slim, weights: LayerWeights) -> int:
    return params.kept(weights.down.shape[-1])


def _scores(params: Slim, weights: LayerWeights, x_TH: Tensor, seed: int) -> Tensor:
    if params.by == "magnitude":
        return magnitudes(weights)
    if params.by == "random":
        return chances(weights, seed)
    x_TH = x_TH.float()
    routing = gate_routing(weights, x_TH, params.top)
    return taylor_terms(weights, routing, x_TH, layer_gradient(weights, routing, x_TH)).abs()


def gate_routing(weights: LayerWeights, x_TH: Tensor, top: int) -> Routing:
    """Return each token's ``top`` best experts by the layer's gate, weighted by a softmax over these.

    With a selection bias, which is DeepSeek-V3's, experts are chosen by sigmoid + bias and weighted by sigmoid.
    """
    if weights.router_EH is None:
        raise ValueError("the layer has no gate to route calibration tokens; slim it by magnitude or random.")
    if len(x_TH) == 0:
        raise ValueError("Taylor terms are sums over tokens and got none; ask for calibration tokens.")
    logits_TE = nnf.linear(x_TH, weights.router_EH.to(x_TH.dtype))
    if weights.router_bias_E is None:
        weights_TK, indices_TK = logits_TE.topk(top, dim=-1)
        return Routing.topk(indices_TK, weights_TK.softmax(-1), logits_TE.shape[1])
    scores_TE = logits_TE.sigmoid()
    indices_TK = (scores_TE + weights.router_bias_E).topk(top, dim=-1).indices
    weights_TK = nnf.normalize(scores_TE.gather(1, indices_TK), p=1.0, dim=-1)
    return Routing.topk(indices_TK, weights_TK, logits_TE.shape[1])


def merged(params: Merge) -> StructureStep:
    """Structure ``merge``: similar experts averaged, weighted by the calibration tokens that have them."""

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        load_E = utilisation(weights, activations_TH, params.top)
        features_ED = expert_outputs(weights, activations_TH.float()) if params.by == "outputs" else weights.router_EH
        groups = group_experts(_given(features_ED), load_E, params.kept(len(weights.down)))
        return merge(weights, groups, load_E, params.align)

    return build


def _given(features_ED: Tensor | None) -> Tensor:
    if features_ED is None:
        raise ValueError("the layer has no router rows to group experts by; group them by outputs.")
    return features_ED

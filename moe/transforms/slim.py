"""Neuron slimming: every expert stays and loses hidden channels (SlimMoE, arXiv 2506.18349).

A gated FFN is a sum over its channels, so that leaving some out leaves the others' terms as they were. SlimMoE scores
channel f of an expert by the first-order Taylor term |sum_t h_f dL/dh_f| of its activations h. Magnitude and chance are
what that is held against. Shape letters: T tokens, H hidden, E experts, F channels of an expert, C kept ones, N
assignments.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layer import LayerWeights, assignments, ffn_hidden
from ..routing import Routing


def taylor_terms(weights: LayerWeights, routing: Routing, x_TH: Tensor, gradient_TH: Tensor) -> Tensor:
    """Return sum_t h_f dL/dh_f of each expert's channels, [E, F] float64: add these up over batches, then score |.|.

    ``gradient_TH`` is dL/dy of the sum of the routed experts; with weight w of a token, dL/dh_f = w down[:, f] . dL/dy.
    """
    _check_experts(weights)
    terms_EF = torch.zeros(weights.down.shape[0], weights.down.shape[2], dtype=torch.float64)
    for expert, token_N, weight_N in assignments(routing):
        gate_up, down_HF = weights.gate_up[expert].to(x_TH.dtype), weights.down[expert].to(x_TH.dtype)
        hidden_NF = ffn_hidden(x_TH[token_N], gate_up, weights.activation, weights.gated)
        slope_NF = (gradient_TH[token_N] @ down_HF) * weight_N.to(x_TH.dtype)[:, None]
        terms_EF[expert] = (hidden_NF * slope_NF).double().sum(dim=0).cpu()
    return terms_EF


def layer_gradient(weights: LayerWeights, routing: Routing, x_TH: Tensor) -> Tensor:
    """Return dL/dy_TH of the layer's own loss, |y - y'|^2 / (2 |y|^2) of each token at y' = 0: -y / |y|^2.

    For where no model's loss is at hand; y is the sum of the routed experts.
    """
    _check_experts(weights)
    y_TH = torch.zeros_like(x_TH)
    for expert, token_N, weight_N in assignments(routing):
        gate_up, down_HF = weights.gate_up[expert].to(x_TH.dtype), weights.down[expert].to(x_TH.dtype)
        hidden_NF = ffn_hidden(x_TH[token_N], gate_up, weights.activation, weights.gated)
        y_TH = y_TH.index_add(0, token_N, (hidden_NF @ down_HF.T) * weight_N.to(x_TH.dtype)[:, None])
    square_T1 = y_TH.square().sum(dim=1, keepdim=True).clamp(min=torch.finfo(y_TH.dtype).tiny)
    return -y_TH / square_T1


def magnitudes(weights: LayerWeights) -> Tensor:
    """Return the norm of all weights of each channel, [E, F] float64: its rows of gate and up, its column of down."""
    _check_experts(weights)
    experts, hidden, width = weights.down.shape
    rows_EPFH = weights.gate_up.double().reshape(experts, -1, width, hidden)
    squares_EF: Tensor = rows_EPFH.square().sum(dim=(1, 3)) + weights.down.double().square().sum(dim=1)
    return squares_EF.sqrt()


def chances(weights: LayerWeights, seed: int) -> Tensor:
    """Return scores drawn from the seed, [E, F] float64."""
    _check_experts(weights)
    size = (weights.down.shape[0], weights.down.shape[2])
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best_channels(score_EF: Tensor, width: int) -> Tensor:
    """Return the ``width`` channels of the largest score of each expert, [E, C] int64, each row rising."""
    if not 0 < width <= score_EF.shape[1]:
        raise ValueError(f"width={width} must lie between 1 and the experts' {score_EF.shape[1]} channels.")
    return score_EF.argsort(dim=1, descending=True, stable=True)[:, :width].sort(dim=1).values


def slim(weights: LayerWeights, kept_EC: Tensor) -> LayerWeights:
    """Return the layer whose experts have their channels ``kept_EC`` alone; router and shared expert stay."""
    _check_experts(weights)
    experts, hidden, width = weights.down.shape
    rising = bool((kept_EC[:, 1:] > kept_EC[:, :-1]).all()) and int(kept_EC.min()) >= 0 and int(kept_EC.max()) < width
    if len(kept_EC) != experts or not rising:
        raise ValueError(f"kept wants rising channels below {width} for each of the layer's {experts} experts.")
    parts_EPFH = weights.gate_up.reshape(experts, -1, width, hidden)
    rows_EPCH = parts_EPFH.gather(2, kept_EC[:, None, :, None].expand(-1, parts_EPFH.shape[1], -1, hidden))
    down = weights.down.gather(2, kept_EC[:, None, :].expand(-1, hidden, -1))
    return replace(weights, gate_up=rows_EPCH.flatten(1, 2).contiguous(), down=down.contiguous())


def _check_experts(weights: LayerWeights) -> None:
    if weights.is_dense or weights.heads:
        raise ValueError("slimming wants a layer of FFN experts; choose a model with experts.")

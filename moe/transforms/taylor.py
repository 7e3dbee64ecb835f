"""Structure ``taylor``: a dense gated FFN as experts of its channels, with the important channels always on.

Shape letters: T tokens, F channels of the dense FFN, E routed experts, C channels of one expert, S shared channels,
H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layer import LayerWeights, ffn_hidden
from ..structure import StructureStep, assign_channels, channel_contributions, check_cut, slices_with_router
from .slim import chances, magnitudes

if TYPE_CHECKING:
    from .params import TaylorSplit


def taylor(params: TaylorSplit) -> StructureStep:
    """Return the step: the most important channels to the shared expert, the rest to experts as ``assignment`` says."""

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        check_cut(weights, activations_TH, params.experts, "taylor")
        x_TH = activations_TH.float()
        width = weights.down.shape[1]
        ranked_F = torch.argsort(_importance(params, weights, x_TH, seed), descending=True, stable=True)
        always = params.shared * (width // params.experts)
        shared_S, rest_R = ranked_F[:always].sort().values, ranked_F[always:].sort().values
        contribution_TR = channel_contributions(weights, x_TH)[:, rest_R]
        place_EC = assign_channels(contribution_TR, params.experts - params.shared, params.assignment, seed)
        return slices_with_router(weights, x_TH, rest_R[place_EC], shared_S)

    return build


def _importance(params: TaylorSplit, weights: LayerWeights, x_TH: Tensor, seed: int) -> Tensor:
    if params.by == "taylor":
        return taylor_importance(weights, x_TH)
    one = replace(weights, gate_up=weights.gate_up[None], down=weights.down[None])
    return magnitudes(one)[0] if params.by == "magnitude" else chances(one, seed)[0]


def taylor_importance(weights: LayerWeights, x_TH: Tensor) -> Tensor:
    """Return mean_t |h_f dL/dh_f|, [F] float32, for L = |y - y'|^2 / (2 |y|^2) at y' = 0.

    y is the layer's output and y' = sum_f h_f down[:, f] what is kept of it: dL/dh_f = -down[:, f] . y / |y|^2. Every
    token counts the same; without the division a few tokens with massive activations would decide.
    """
    down_HF = weights.down.to(x_TH.dtype)
    hidden_TF = ffn_hidden(x_TH, weights.gate_up.to(x_TH.dtype), weights.activation)
    y_TH = hidden_TF @ down_HF.T
    square_T1 = y_TH.square().sum(dim=1, keepdim=True).clamp(min=torch.finfo(y_TH.dtype).tiny)
    return (hidden_TF * (y_TH @ down_HF) / square_T1).abs().mean(dim=0)

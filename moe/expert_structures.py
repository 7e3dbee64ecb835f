"""Structures whose experts are no FFNs of the model: its single neurons, and attentions in the place of its FFNs.

Shape letters: E experts, F width of one FFN, G matrices (gate, up) of a gated FFN or 1, H hidden, Q = H width of all
heads, V = E F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from .layer import LayerWeights
from .router import seeded_normal

if TYPE_CHECKING:
    from .structure_params import Attentions, Neurons

StructureStep = Callable[[LayerWeights, Tensor, int], LayerWeights]


def neurons(params: Neurons) -> StructureStep:
    """Structure ``neurons``: neuron f of expert e is expert e F + f, with its rows of gate and up, its column of down.

    y = sum_f act(g_f x) (u_f x) d_f for each FFN, so that the neurons are a partition of it; routers and their biases
    belong to the experts of old and go.
    """

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        matrices = 2 if weights.gated else 1
        hidden, width = weights.down.shape[-2:]
        gate_up = weights.gate_up.reshape(-1, matrices, width, hidden).transpose(1, 2).reshape(-1, matrices, hidden)
        down = weights.down.transpose(-2, -1).reshape(-1, hidden, 1)
        return replace(weights, gate_up=gate_up, down=down, router_EH=None, router_bias_E=None)

    return build


def attentions(params: Attentions) -> StructureStep:
    """Structure ``attention``: seeded attentions, the same at every layer of one seed; see ``ExpertStore``."""

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        hidden = weights.gate_up.shape[-1]
        gate_up = seeded_normal((params.experts, 3 * hidden, hidden), hidden**-0.5, seed, "attention.qkv")
        down = seeded_normal((params.experts, hidden, hidden), hidden**-0.5, seed, "attention.output")
        return LayerWeights(gate_up, down, activation=weights.activation, gated=weights.gated, heads=params.heads)

    return build

"""AoE, aggregation of experts: the experts and gate rows of two checkpoints in one layer (Z-code M3, arXiv 2109.10465).

Shape letters: E experts of the first layer and of the second.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layer import LayerWeights


def aggregate(first: LayerWeights, second: LayerWeights) -> LayerWeights:
    """Return one layer with the experts of both, those of ``first`` with the lower ids.

    A softmax now runs over all of them, so that weights that are not renormalised shrink: the aggregate of a layer with
    itself gives its top-1 expert exactly half the probability. Continue training, or renormalise.
    """
    if first.is_dense or second.is_dense or first.gate_up.shape[1:] != second.gate_up.shape[1:]:
        raise ValueError("aggregate wants two layers of experts of one width and hidden size.")
    if (first.activation, first.gated) != (second.activation, second.gated):
        raise ValueError("aggregate wants experts of one activation, both gated or both not.")
    if first.shared is not second.shared:
        raise ValueError("two different shared experts cannot be concatenated; give both layers the same one or none.")
    return replace(
        first,
        gate_up=torch.cat([first.gate_up, second.gate_up]),
        down=torch.cat([first.down, second.down]),
        router_EH=_joined(first.router_EH, second.router_EH, "router"),
        router_bias_E=_joined(first.router_bias_E, second.router_bias_E, "router bias"),
    )


def _joined(first: Tensor | None, second: Tensor | None, name: str) -> Tensor | None:
    if first is None and second is None:
        return None
    if first is None or second is None:
        raise ValueError(f"only one of the two layers has a {name}; give both or neither.")
    return torch.cat([first, second])

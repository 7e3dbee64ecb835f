"""How far a changed layer lies from the dense model's, and how far its routing moves on the changed residual stream.

Shape letters: T tokens, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...contracts import Metric, Series
from ...moe.routing_metrics.agreement import agreement_per_token
from .block import Call
from .bootstrap import metric_of

FIGURES = ("output_error", "router_top1_agreement", "router_jaccard")
"""Means over tokens and changed layers.

``output_error``: |y - y'| / |y'|, y' the dense model's layer on the same input. The others compare the router's choice
with what it would have chosen in the dense model, where no layer before it had changed and no gate is rounded: the same
heaviest expert, and common over all experts.
"""


def columns_of(call: Call) -> Tensor:
    """Return FIGURES of each token of one layer's call, float64 [T, 3]."""
    agreement_T3 = agreement_per_token(call.routing, call.dense_routing)
    return torch.stack([call.error_T, agreement_T3[:, 0], agreement_T3[:, 2]], dim=1)


def distance_metrics(by_layer: Mapping[int, Sequence[Tensor]], seed: int) -> list[Metric]:
    """Return FIGURES with their intervals; ``by_layer`` has the columns of each layer, window by window."""
    mean_TC = torch.stack([torch.cat(list(parts)) for parts in by_layer.values()]).mean(0)
    ones_T = torch.ones(len(mean_TC), dtype=mean_TC.dtype)
    return [
        metric_of(
            name, "1", torch.stack([mean_TC[:, place], ones_T], 1), lambda sums: sums[..., 0] / sums[..., 1], seed
        )
        for place, name in enumerate(FIGURES)
    ]


def error_series(by_layer: Mapping[int, Sequence[Tensor]]) -> Series:
    """Return ``output_error_by_layer``: the mean over tokens of each changed layer, by rising index."""
    place = FIGURES.index("output_error")
    means = [float(torch.cat(list(by_layer[index]))[:, place].mean()) for index in sorted(by_layer)]
    return Series("output_error_by_layer", tuple(means), "1")

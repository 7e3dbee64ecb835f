"""Activation flow (MoHD, 2412.05644): how few residual dimensions carry a token, and whether its neighbour has them.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def carrying(h_TH: Tensor, share: float) -> Tensor:
    """Return whether each dimension is among the fewest of its token that hold ``share`` of its |h|_1, bool [T, H]."""
    size_TH = h_TH.double().abs()
    sorted_TH, order_TH = size_TH.sort(dim=1, descending=True, stable=True)
    before_TH = sorted_TH.cumsum(dim=1) - sorted_TH
    wanted_TH = before_TH < share * size_TH.sum(dim=1, keepdim=True)
    return torch.zeros_like(wanted_TH).scatter(1, order_TH, wanted_TH)


def overlap(first_NH: Tensor, second_NH: Tensor) -> float:
    """Return the mean Jaccard index of rows of two boolean tables; two empty rows are alike."""
    both_N = (first_NH & second_NH).sum(dim=1).double()
    either_N = (first_NH | second_NH).sum(dim=1).double()
    return float(torch.where(either_N > 0, both_N / either_N.clamp(min=1), 1.0).mean())

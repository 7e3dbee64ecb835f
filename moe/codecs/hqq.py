"""HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023): offsets without data.

The scales are those of rounding to nearest; the offsets z are what is sought. With W^ the weights as coded, it
minimises |W - W^|_p^p, p < 1, by splitting off an error E that may be large in few places: E is W - W^ shrunk, and then
z the mean of W - E - codes * scale, in turns.

Written from the description, with two departures from the released code: errors are measured in units of the group's
scale, so that the shrinkage means the same for weights of any size; and each group keeps the best offset that it ever
had, as stored in bfloat16 and measured by the p-norm (the code stops for all groups when the mean |W - W^| grows).

Shape letters: O output rows, I input channels, G groups of a row, N weights of a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...contracts import Scheme
from ..channel_stats import ChannelStats
from .grid import Grid, check_group, in_groups
from .integer import IntTensor
from .integer_params import Hqq


def encode(weight_OI: Tensor, how: Hqq | Scheme, stats: ChannelStats | None = None) -> IntTensor:
    """Return ``weight_OI`` with offsets of a small p-norm of the error; statistics are not looked at.

    No group's p-norm is above that of rounding to nearest, where the search begins.

    Raises:
        ValueError: the group does not divide the input width, or a weight is not finite.
    """
    params = Hqq.of(how)
    check_group(params.group, weight_OI.shape[1])
    weight_OGN = in_groups(weight_OI.float(), params.group)
    grid = best_grid(weight_OGN, Grid.fit(weight_OGN, params.bits, symmetric=False), params)
    return IntTensor.pack(grid.codes(weight_OGN), grid, params.scheme())


def best_grid(weight_OGN: Tensor, grid: Grid, params: Hqq) -> Grid:
    """Return ``grid`` with the best offsets of ``params.iterations`` steps."""
    best, least_OG, beta = grid, p_norms(weight_OGN, grid, params.p), params.beta
    for _ in range(params.iterations):
        grid = replace(grid, zeros_OG=_next_zeros(weight_OGN, grid, beta, params.p).to(grid.scales_OG.dtype))
        error_OG = p_norms(weight_OGN, grid, params.p)
        better_OG = error_OG < least_OG
        best = replace(best, zeros_OG=torch.where(better_OG, grid.offsets_OG, best.offsets_OG))
        least_OG = torch.where(better_OG, error_OG, least_OG)
        beta *= params.kappa
    return best


def p_norms(weight_OGN: Tensor, grid: Grid, p: float) -> Tensor:
    """Return the sum of |error|^p of each group [O, G]."""
    return (weight_OGN - grid.levels(grid.codes(weight_OGN))).abs().pow(p).sum(-1)


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """Return the generalised soft threshold sign(e) max(0, |e| - |e|^(p-1) / beta)."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)


def _next_zeros(weight_OGN: Tensor, grid: Grid, beta: float, p: float) -> Tensor:
    """Return the offsets [O, G] that fit best what the shrunk error leaves of the weights."""
    step_OG1 = grid.scales_OG.float()[:, :, None]
    step_OG1 = torch.where(step_OG1 > 0, step_OG1, torch.ones_like(step_OG1))
    error_OGN = weight_OGN - grid.levels(grid.codes(weight_OGN))
    outliers_OGN = step_OG1 * shrink(error_OGN / step_OG1, beta, p)
    return grid.offsets_OG.float() + (error_OGN - outliers_OGN).mean(-1)

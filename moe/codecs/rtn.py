"""Rounding to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Scheme
from ..channel_stats import ChannelStats
from .grid import Grid, check_group, in_groups
from .integer import IntTensor
from .integer_params import Rtn


def encode(weight_OI: Tensor, how: Rtn | Scheme, stats: ChannelStats | None = None) -> IntTensor:
    """Return ``weight_OI`` rounded to nearest; statistics are not looked at.

    Symmetric codes of one bit are nearer to most weights than those of two, whose outer levels are rarely met.

    Raises:
        ValueError: the group does not divide the input width, or a weight is not finite.
    """
    params = Rtn.of(how)
    return round_to_nearest(weight_OI, params.scheme())


def round_to_nearest(weight_OI: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> IntTensor:
    """Return ``weight_OI`` [out, in] rounded to nearest under ``scheme`` (1 to 8 bits), whatever its codec is called.

    With s and z rounded to ``scale_dtype`` (relative error u, 2^-8 for bfloat16) a weight is off by at most
    max(s / 2, u (|z| + 2^(b-1) s)): half a step inside the range of codes, and at its ends what the rounding of s and z
    cut off. That second term is below half a step but for asymmetric 8 bits (up to a step) and groups far from zero.
    Float32 scales are for measuring what bfloat16 costs. (One symmetric bit has no such bound: it is a sign.)
    """
    check_group(scheme.group, weight_OI.shape[1])
    weight_OGN = in_groups(weight_OI, scheme.group)
    grid = Grid.fit(weight_OGN, int(scheme.bits), scheme.symmetric, scale_dtype)
    return IntTensor.pack(grid.codes(weight_OGN), grid, scheme)

"""AWQ (Lin et al., arXiv 2306.00978): what large activations multiply is scaled up before rounding, then clipped.

Written from the paper, for one matrix on its own: the inverse scale of each input channel is stored beside the codes
(the released code folds it into the operation before, which experts of one layer share). The error is that of the
matrix's outputs on the calibration tokens, from their second moment. No row's clipping is kept that makes it larger.

Shape letters: O output rows, I input channels, G groups of a row, N weights of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...contracts import Scheme
from ..channel_stats import ChannelStats
from .calibrated import check_finite, require, row_errors, second_moment
from .grid import Grid, check_group, in_groups
from .integer import IntTensor
from .integer_params import Awq
from .rtn import round_to_nearest

SMALLEST = 1e-4
"""The least that (mean|x|)^r counts as, relative to the channel where it is largest."""


@dataclass(frozen=True, eq=False)
class AwqTensor:
    """A weight matrix [out, in] whose ``integer`` codes are those of W times ``channel_scales`` [in] (bfloat16)."""

    integer: IntTensor
    channel_scales: Tensor

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> AwqTensor:
        """Return the tensor that ``parts`` took apart."""
        return cls(IntTensor.of(parts, scheme, shape), parts["channel_scales"])

    def parts(self) -> dict[str, Tensor]:
        """Return what is stored, by name."""
        return {**self.integer.parts(), "channel_scales": self.channel_scales}

    @property
    def scheme(self) -> Scheme:
        """How the matrix is stored."""
        return self.integer.scheme

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.integer.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and channel scales as stored."""
        return sum(part.nbytes for part in self.parts().values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: (code * scale + zero) / channel scale, computed in float32, then rounded to ``dtype``."""
        return (self.integer.dequantize() / self.channel_scales.float()).to(dtype)

    def linear(self, x: Tensor) -> Tensor:
        """Return x W^T [.., out] for x [.., in], with the dequantized weights in the type of x."""
        return x @ self.dequantize(x.dtype).T


def encode(weight_OI: Tensor, how: Awq | Scheme, stats: ChannelStats | None) -> AwqTensor:
    """Return ``weight_OI`` in the codes and channel scales with the least output error that the searches found.

    It is never above that of rounding to nearest, which is one of the candidates (r = 0, nothing clipped).

    Raises:
        ValueError: no statistics, ones that do not fit or are not finite, weights that are not finite, or a group that
            does not divide the input width.
    """
    params = Awq.of(how)
    check_group(params.group, weight_OI.shape[1])
    check_finite(weight_OI)
    stats = require("awq", weight_OI, stats)
    moment_II, weight_OI = second_moment("awq", weight_OI, stats), weight_OI.float()
    ratios = (step / params.grid for step in range(params.grid))
    tried = (scaled(weight_OI, channel_scales(stats.mean_abs_I, ratio), params.scheme()) for ratio in ratios)
    best = min(tried, key=lambda tensor: float(row_errors(tensor.dequantize() - weight_OI, moment_II).sum()))
    return clipped(weight_OI, best, moment_II, params) if params.clip else best


def channel_scales(mean_abs_I: Tensor, ratio: float) -> Tensor:
    """Return (mean|x|)^ratio over the geometric mean of its extremes, in bfloat16; 1 where no channel was active."""
    relative_I = mean_abs_I.float() / mean_abs_I.max().clamp(min=torch.finfo(torch.float32).tiny)
    scales_I = (relative_I if bool(relative_I.any()) else torch.ones_like(relative_I)).pow(ratio).clamp(min=SMALLEST)
    return (scales_I / (scales_I.max() * scales_I.min()).sqrt()).bfloat16()


def scaled(weight_OI: Tensor, scales_I: Tensor, scheme: Scheme) -> AwqTensor:
    """Return the weights with their channels scaled by ``scales_I``, rounded to nearest."""
    return AwqTensor(round_to_nearest(weight_OI * scales_I.float(), scheme), scales_I)


def clipped(weight_OI: Tensor, tensor: AwqTensor, moment_II: Tensor, params: Awq) -> AwqTensor:
    """Return ``tensor`` with the range of each group cut where that lessens the error of the group, and of the row.

    Groups are searched one by one, each by the outputs that it alone contributes; what they do together to a row is
    looked at in the end, and its clipping taken back where the row is worse for it.
    """
    scales_I = tensor.channel_scales.float()
    scaled_OGN = in_groups(weight_OI * scales_I, params.group)
    moment_GNN = _group_moments(moment_II / torch.outer(scales_I, scales_I).double(), scaled_OGN.shape[2])
    limit_OG1 = _limits(scaled_OGN, moment_GNN, params)
    cut = round_to_nearest(scaled_OGN.clamp(-limit_OG1, limit_OG1).flatten(1), params.scheme())
    before, after = (replace(tensor, integer=integer) for integer in (tensor.integer, cut))
    before_O, after_O = (row_errors(made.dequantize() - weight_OI, moment_II) for made in (before, after))
    better_O1 = (after_O < before_O)[:, None]
    kept = {name: torch.where(better_O1, part, before.parts()[name]) for name, part in cut.parts().items()}
    return replace(tensor, integer=IntTensor.of(kept, tensor.scheme, tensor.shape))


def _group_moments(moment_II: Tensor, group: int) -> Tensor:
    """Return the second moments within each group [G, N, N]."""
    starts = range(0, len(moment_II), group)
    return torch.stack([moment_II[start : start + group, start : start + group] for start in starts])


def _limits(scaled_OGN: Tensor, moment_GNN: Tensor, params: Awq) -> Tensor:
    """Return the bound on |w| [O, G, 1] with the least error of each group's own outputs."""
    largest_OG1 = scaled_OGN.abs().amax(-1, keepdim=True)
    limit_OG1, least_OG = largest_OG1, torch.full(scaled_OGN.shape[:2], torch.inf, dtype=torch.float64)
    for step in range(round(params.clip * params.grid) + 1):
        tried_OG1 = largest_OG1 * (1 - step / params.grid)
        cut_OGN = scaled_OGN.clamp(-tried_OG1, tried_OG1)
        grid = Grid.fit(cut_OGN, params.bits, params.symmetric)
        difference_GON = (grid.levels(grid.codes(cut_OGN)) - scaled_OGN).double().transpose(0, 1)
        error_OG = ((difference_GON @ moment_GNN) * difference_GON).sum(-1).T
        better_OG = error_OG < least_OG
        limit_OG1 = torch.where(better_OG[:, :, None], tried_OG1, limit_OG1)
        least_OG = torch.where(better_OG, error_OG, least_OG)
    return limit_OG1

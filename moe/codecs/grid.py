"""The levels that integer codes stand for: a scale, and asymmetric an offset, for each group of input channels.

Shape letters: O output rows, I input channels, G groups of a row, N weights of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels c * scale + zero, c a signed integer of ``bits`` bits: -2^(b-1) .. 2^(b-1) - 1.

    ``scales_OG`` and ``zeros_OG`` (None = symmetric) have the type in which they are stored. A symmetric grid of one
    bit is -scale and +scale: its codes are the signs -1 and 1.
    """

    scales_OG: Tensor
    zeros_OG: Tensor | None
    bits: int

    @classmethod
    def fit(cls, weight_OGN: Tensor, bits: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Grid:
        """Return the grid of rounding to nearest for groups of weights, stored as ``dtype``.

        Symmetric: s = max|w| / (2^(b-1) - 1), for one bit s = mean|w|. Asymmetric: s = (max - min) / (2^b - 1),
        z = min + 2^(b-1) s, so that the lowest and the highest level are min and max.
        """
        top = 2 ** (bits - 1)
        weight_OGN, zeros = weight_OGN.float(), None
        if symmetric:
            scales = weight_OGN.abs().mean(-1) if bits == 1 else weight_OGN.abs().amax(-1) / (top - 1)
        else:
            low, high = weight_OGN.aminmax(dim=-1)
            scales = (high - low) / (2 * top - 1)
            zeros = (low + top * scales).to(dtype)
        scales = scales.to(dtype)
        if not bool(scales.isfinite().all()):
            raise ValueError("the weights contain NaN or infinity and cannot be quantized; repair the checkpoint.")
        return cls(scales, zeros, bits)

    @classmethod
    def join(cls, grids: Sequence[Grid]) -> Grid:
        """Return neighbouring groups as one grid."""
        zeros = [grid.zeros_OG for grid in grids if grid.zeros_OG is not None]
        scales_OG = torch.cat([grid.scales_OG for grid in grids], dim=1)
        return cls(scales_OG, torch.cat(zeros, dim=1) if zeros else None, grids[0].bits)

    @property
    def signs(self) -> bool:
        """Whether the codes are -1 and 1."""
        return self.bits == 1 and self.zeros_OG is None

    @property
    def offsets_OG(self) -> Tensor:
        """The zeros, which are 0 where the grid is symmetric."""
        return torch.zeros_like(self.scales_OG) if self.zeros_OG is None else self.zeros_OG

    def codes(self, weight_OGN: Tensor) -> Tensor:
        """Return the codes (as float32) whose levels are nearest; any will do where a scale is 0."""
        weight_OGN = weight_OGN.float()
        if self.signs:
            return torch.where(weight_OGN < 0, -1.0, 1.0)
        step = self.scales_OG.float()[:, :, None]
        centred = weight_OGN if self.zeros_OG is None else weight_OGN - self.zeros_OG.float()[:, :, None]
        top = 2 ** (self.bits - 1)
        return (centred / torch.where(step > 0, step, torch.ones_like(step))).round().clamp(-top, top - 1)

    def levels(self, codes_OGN: Tensor) -> Tensor:
        """Return code * scale + zero in float32."""
        levels_OGN = codes_OGN.float() * self.scales_OG.float()[:, :, None]
        return levels_OGN if self.zeros_OG is None else levels_OGN + self.zeros_OG.float()[:, :, None]


def in_groups(weight_OI: Tensor, group: int | None) -> Tensor:
    """Return the weights as [O, G, N]: groups of ``group`` neighbouring input channels, None = whole rows."""
    return weight_OI.reshape(weight_OI.shape[0], -1, group or weight_OI.shape[1])


def usable_groups(group: int, *widths: int) -> str:
    """Return, as words, the groups nearest to ``group`` that divide all ``widths``."""
    common = math.gcd(*widths)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    nearest = sorted(divisors, key=lambda d: abs(math.log(d / max(group, 1))))[:4]
    return ", ".join(str(d) for d in sorted(nearest))


def check_group(group: int | None, *widths: int) -> None:
    """Refuse a group that does not divide every input width."""
    if group is not None and (group < 1 or any(width % group for width in widths)):
        named = " and ".join(str(width) for width in dict.fromkeys(widths))
        raise ValueError(f"group={group} does not divide the input width {named}; use {usable_groups(group, *widths)}.")

"""NF4 and FP4: 4 bit codes into a table of 16 values, scaled by the largest magnitude of a block.

Tables, nearest values, ties (to the smaller value) and bytes (the first of two codes in the high nibble) are those of
bitsandbytes, which QLoRA (arXiv 2305.14314) describes; blocks never cross a row here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Scheme
from ..channel_stats import ChannelStats
from .tensor import BlockTensor, blocks_of, check_weight, pack_nibbles, unpack_nibbles

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a standard normal, each side spread evenly over its probability, divided by the largest."""

FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Twelve times the values of codes 0..7 (sign, 2 bits of exponent, 1 of fraction); codes 8..15 are their negatives."""

SMALLEST = 1e-38
"""Below this a block's largest magnitude divides as if it were this: its reciprocal must be finite."""


def table(codec: str, device: torch.device) -> Tensor:
    """Return the 16 values of the codes of ``nf4`` or ``fp4``, in float32."""
    if codec == "nf4":
        return torch.tensor(NF4, device=device)
    positive = torch.tensor(FP4_TWELFTHS, device=device) / 12
    return torch.cat([positive, 0 - positive])


@dataclass(frozen=True, eq=False)
class CodebookTensor(BlockTensor):
    """Codes as uint8 [out, in / 2], the first in the high nibble, and ``absmax`` float32 [out, in / block]."""

    codes: Tensor
    absmax: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: table value * absmax of the block, computed in float32 and then rounded to ``dtype``."""
        values = table(self.scheme.codec, self.codes.device)[unpack_nibbles(self.codes, "high")]
        return (values.view(*self.absmax.shape, -1) * self.absmax[:, :, None]).flatten(1).to(dtype)


def encode(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> CodebookTensor:
    """Return ``weight`` [out, in] in ``nf4`` or ``fp4``, each weight at its nearest value; needs no ``stats``.

    Raises ValueError where blocks do not divide the width, or for NaN and infinity.
    """
    block = scheme.group or weight.shape[1]
    check_weight(weight, scheme.codec, block)
    blocks = blocks_of(weight, block)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, :, None]).clamp(-1, 1).flatten(1)
    values, order = table(scheme.codec, weight.device).sort(stable=True)
    codes = order[torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)]
    return CodebookTensor(scheme, (weight.shape[0], weight.shape[1]), pack_nibbles(codes, "high"), absmax)

"""Ternary and binary weights: the least that a weight can be, packed as tightly as bytes allow.

Ternary is the rule of BitNet b1.58 (arXiv 2402.17764): divide by the mean |w| of the matrix, round, keep -1..1. Five
codes share a byte in base 3 (3^5 = 243 <= 256): 1.6 bits per weight, ceil(in / 5) bytes a row and 4 bytes a matrix.
Binary is sign(w) times mean |w|, the least-squares scale (XNOR-Net, arXiv 1603.05279): ceil(in / 8) bytes a row and 2
bytes a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Scheme
from ..channel_stats import ChannelStats
from ..codecs.grid import check_group
from ..codecs.packing import pack_codes
from .tensor import BlockTensor, blocks_of, check_weight, nonzero

TRITS = 5
"""Ternary codes in a byte."""


def pack_trits(codes: Tensor) -> Tensor:
    """Return codes -1..1 [out, in] as uint8 [out, ceil(in / 5)]: the first is the lowest base-3 digit, plus one."""
    padded = torch.nn.functional.pad(codes + 1, (0, -codes.shape[1] % TRITS))
    packed = padded.reshape(codes.shape[0], -1, TRITS) * 3 ** torch.arange(TRITS, device=codes.device)
    return packed.sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, width: int) -> Tensor:
    """Return the codes -1..1 [out, width] of packed bytes, as int64."""
    digits: Tensor = packed.long()[:, :, None] // 3 ** torch.arange(TRITS, device=packed.device) % 3
    return digits.flatten(1)[:, :width] - 1


@dataclass(frozen=True, eq=False)
class TernaryTensor(BlockTensor):
    """Codes as uint8 [out, ceil(in / 5)] and one float32 ``scale`` [1]."""

    codes: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: -scale, 0 or scale, rounded to ``dtype``."""
        return (unpack_trits(self.codes, self.shape[1]) * self.scale).to(dtype)


@dataclass(frozen=True, eq=False)
class BinaryTensor(BlockTensor):
    """Signs (1 = not negative) as uint8 [out, ceil(in / 8)], the first lowest; bfloat16 ``scales`` [out, groups]."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: scale or -scale, rounded to ``dtype``."""
        bits = (self.codes[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=self.codes.device)) & 1
        signs = 2.0 * bits.flatten(1)[:, : self.shape[1]] - 1
        return (signs.view(*self.scales.shape, -1) * self.scales.float()[:, :, None]).flatten(1).to(dtype)


def encode_ternary(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> TernaryTensor:
    """Return ``weight`` [out, in] as round(w / mean|w|) in -1..1; needs no ``stats``.

    Raises ValueError for NaN and infinity.
    """
    check_weight(weight, scheme.codec)
    scale = weight.float().abs().mean().reshape(1)
    codes = (weight.float() / nonzero(scale)).round().clamp(-1, 1).long()
    return TernaryTensor(scheme, (weight.shape[0], weight.shape[1]), pack_trits(codes), scale)


def encode_binary(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> BinaryTensor:
    """Return ``weight`` [out, in] as its signs, zero counting as positive; needs no ``stats``.

    Raises ValueError where groups do not divide the width, or for NaN and infinity.
    """
    check_group(scheme.group, weight.shape[1])
    check_weight(weight, scheme.codec)
    groups = blocks_of(weight, scheme.group or weight.shape[1])
    scales = groups.abs().mean(-1).to(torch.bfloat16)
    codes = pack_codes(weight >= 0, 1)
    return BinaryTensor(scheme, (weight.shape[0], weight.shape[1]), codes, scales)

"""MXFP4, NVFP4 and FP8: floats of 4 or 8 bits under a scale per block, per matrix or per row.

E2M1 is a sign, two bits of exponent and one of fraction: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Weights are rounded to nearest,
ties to the even code, and saturate at 6 (OCP Microscaling Formats 1.0, sections 5.3.3 and 6.3). The first of two codes
lies in the low nibble.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Scheme
from ..channel_stats import ChannelStats
from .tensor import BlockTensor, blocks_of, check_weight, nonzero, pack_nibbles, unpack_nibbles

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of codes 0..7; codes 8..15 are their negatives."""

E8M0_BIAS = 127
E8M0_LARGEST = 254
"""Code c stands for 2^(c - 127); 255 is NaN and never written."""

E4M3 = torch.finfo(torch.float8_e4m3fn)

FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""The storage of a codec's codes."""


def to_e2m1(values: Tensor) -> Tensor:
    """Return the codes 0..15 nearest to float32 ``values``, ties to even codes; a negative zero keeps its sign."""
    magnitudes = torch.tensor(E2M1, device=values.device)
    middle = (magnitudes[:-1] + magnitudes[1:]) / 2
    # bucketize counts the bounds below a value: a tie goes down, unless its bound steps aside for an even code above.
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros_like(middle[1::2]))
    return torch.bucketize(values.abs(), middle) + 8 * values.signbit()


def from_e2m1(codes: Tensor) -> Tensor:
    """Return the float32 values of codes 0..15."""
    positive = torch.tensor(E2M1, device=codes.device)
    return torch.cat([positive, -positive])[codes]


def to_e8m0(largest: Tensor) -> Tensor:
    """Return the codes (uint8) of 2^(floor(log2 m) - 2) for magnitudes m: m / scale lies in [4, 8), and 0 gives 0.

    2 is the exponent of E2M1's largest value; from 6 on a scaled weight saturates, at 8/6 at worst (OCP, section 6.3).
    """
    exponent = torch.frexp(largest).exponent - 1
    code = (exponent - 2 + E8M0_BIAS).clamp(0, E8M0_LARGEST)
    return torch.where(largest > 0, code, torch.zeros_like(code)).to(torch.uint8)


def from_e8m0(codes: Tensor) -> Tensor:
    """Return the float32 powers of two of E8M0 codes (uint8)."""
    return codes.view(torch.float8_e8m0fnu).float()


@dataclass(frozen=True, eq=False)
class Mxfp4Tensor(BlockTensor):
    """E2M1 codes as uint8 [out, in / 2] and E8M0 ``scales`` as uint8 [out, in / 32]."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: code * scale, exact in float32 and then rounded to ``dtype``."""
        blocks = from_e2m1(unpack_nibbles(self.codes, "low")).view(*self.scales.shape, -1)
        return (blocks * from_e8m0(self.scales)[:, :, None]).flatten(1).to(dtype)


@dataclass(frozen=True, eq=False)
class Nvfp4Tensor(BlockTensor):
    """E2M1 codes as uint8 [out, in / 2], e4m3 ``scales`` [out, in / 16] and one float32 ``tensor_scale`` [1]."""

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: code * (tensor scale * scale), computed in float32 and then rounded to ``dtype``."""
        blocks = from_e2m1(unpack_nibbles(self.codes, "low")).view(*self.scales.shape, -1)
        return (blocks * (self.tensor_scale * self.scales.float())[:, :, None]).flatten(1).to(dtype)


@dataclass(frozen=True, eq=False)
class Fp8Tensor(BlockTensor):
    """Codes as torch's float8 [out, in] and ``scales`` float32 [out]."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return [out, in]: code * scale, computed in float32 and then rounded to ``dtype``."""
        return (self.codes.float() * self.scales[:, None]).to(dtype)


def encode_mxfp4(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> Mxfp4Tensor:
    """Return ``weight`` [out, in] in MXFP4; needs no ``stats``. Raises ValueError for other widths, NaN, infinity."""
    check_weight(weight, scheme.codec, scheme.group or 1)
    blocks = blocks_of(weight, scheme.group or 1)
    scales = to_e8m0(blocks.abs().amax(-1))
    codes = to_e2m1(blocks / from_e8m0(scales)[:, :, None]).flatten(1)
    return Mxfp4Tensor(scheme, (weight.shape[0], weight.shape[1]), pack_nibbles(codes, "low"), scales)


def encode_nvfp4(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> Nvfp4Tensor:
    """Return ``weight`` [out, in] in NVFP4; needs no ``stats``. Raises ValueError for other widths, NaN, infinity.

    The tensor scale is max|w| / (448 * 6), so that the largest block's scale is e4m3's largest value; block scales
    below e4m3's smallest normal 2^-6 are raised to it, as torchao does.
    """
    check_weight(weight, scheme.codec, scheme.group or 1)
    blocks = blocks_of(weight, scheme.group or 1)
    largest = blocks.abs().amax(-1)
    tensor_scale = nonzero(largest.amax() / (E4M3.max * E2M1[-1])).reshape(1)
    wanted = largest / E2M1[-1] / tensor_scale
    scales = wanted.clamp(E4M3.tiny, E4M3.max).to(torch.float8_e4m3fn)
    factors = (1 / tensor_scale) / scales.float()
    codes = to_e2m1(blocks * factors[:, :, None]).flatten(1)
    return Nvfp4Tensor(scheme, (weight.shape[0], weight.shape[1]), pack_nibbles(codes, "low"), scales, tensor_scale)


def encode_fp8(weight: Tensor, scheme: Scheme, stats: ChannelStats | None = None) -> Fp8Tensor:
    """Return ``weight`` [out, in] in float8, a row's largest weight at the format's largest; needs no ``stats``.

    Raises ValueError for NaN and infinity.
    """
    check_weight(weight, scheme.codec)
    storage = FP8[scheme.codec]
    scales = weight.float().abs().amax(-1) / torch.finfo(storage).max
    codes = (weight.float() / nonzero(scales)[:, None]).to(storage)
    return Fp8Tensor(scheme, (weight.shape[0], weight.shape[1]), codes, scales)

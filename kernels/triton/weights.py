"""Weights of all experts of a layer as the kernels read them, and one tile of them in float32.

Formats, each with the codes [E, O, I] of a matrix [out, in]: ``dense`` (float32, float16, bfloat16; ``turned`` holds
[E, I, O]); ``int8`` (signed codes c) and ``int4`` (two q = c + 8 in a byte, the first in the low nibble) with
w = c * scale + zero for each row and group; ``fp8`` (e4m3) with a float32 scale for each row; ``mxfp4`` (E2M1 codes as
int4's, a power of two for each 32: OCP Microscaling Formats 1.0); and two that are multiplied as codes (products.py):
``fp8_block`` (e4m3, a float32 scale for 128 x 128 weights) and ``mxfp4_scaled`` (stored as ``mxfp4``). Shape letters:
E experts, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


FP8_BLOCK = 128
"""Rows and columns that share a scale in form ``fp8_block``."""


@dataclass(frozen=True)
class Matrices:
    """One matrix [out, in] of every expert.

    ``codes`` as the format has them; ``scales`` and ``zeros`` [E, O, G] (None: there are none), ``group`` inputs each.
    """

    codes: Tensor
    form: str
    outputs: int
    inputs: int
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0

    @classmethod
    def dense(cls, weights_EOI: Tensor) -> Matrices:
        """Return dense weights, used where they lie."""
        return cls(weights_EOI.contiguous(), "dense", weights_EOI.shape[1], weights_EOI.shape[2])

    @classmethod
    def turned(cls, weights_EOI: Tensor) -> Matrices:
        """Return a copy of dense weights in which what one input channel needs lies in one piece."""
        turned_EIO = weights_EOI.detach().transpose(1, 2).contiguous()
        return cls(turned_EIO, "turned", weights_EOI.shape[1], weights_EOI.shape[2])

    @classmethod
    def fp8_blocks(cls, weights_EOI: Tensor) -> Matrices:
        """Return dense weights in e4m3, each block of 128 x 128 by its largest magnitude; blocks divide both sizes."""
        import torch

        experts, outputs, inputs = weights_EOI.shape
        if outputs % FP8_BLOCK or inputs % FP8_BLOCK:
            raise ValueError(f"blocks of {FP8_BLOCK} do not divide {outputs} and {inputs}; use another form of weights")
        shape = (experts, outputs // FP8_BLOCK, FP8_BLOCK, inputs // FP8_BLOCK, FP8_BLOCK)
        blocks = weights_EOI.detach().float().reshape(shape)
        scales = blocks.abs().amax((2, 4), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / torch.where(scales > 0, scales, torch.ones_like(scales))).to(torch.float8_e4m3fn)
        scales_EGG = scales.reshape(experts, shape[1], shape[3])
        return cls(codes.reshape(weights_EOI.shape), "fp8_block", outputs, inputs, scales_EGG, group=FP8_BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros) if part is not None)

    @property
    def multiplied_as_codes(self) -> bool:
        """Whether products take the codes themselves, as those of single tokens do not."""
        return self.form in ("fp8_block", "mxfp4_scaled")

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zeros; the codes again for what is absent and never read."""
        scales = self.codes if self.scales is None else self.scales
        return self.codes, scales, self.codes if self.zeros is None else self.zeros

    @property
    def constants(self) -> dict[str, object]:
        """The compile-time arguments by which ``tile`` reads them."""
        return {"FORM": self.form, "GROUP": self.group or self.inputs, "SHIFTED": self.zeros is not None}


@triton.jit
def e2m1(code):
    """Return the float32 values of E2M1 codes 0..15: sign, two bits of exponent, one of fraction."""
    exponent = (code >> 1) & 3
    fraction = (code & 1).to(tl.float32)
    normal = (1.0 + 0.5 * fraction) * ((1 << exponent).to(tl.float32) * 0.5)
    size = tl.where(exponent == 0, 0.5 * fraction, normal)
    return tl.where((code & 8) != 0, -size, size)


@triton.jit
def e8m0(code):
    """Return the float32 powers of two 2^(c - 127) of E8M0 codes c."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nibbles(codes_ptr, row, start, inside_row, BYTES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return 4 bit codes [BLOCK_N, BLOCK_K] as int32, of ``row`` [BLOCK_N] from input ``start`` on."""
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)
    inside = inside_row[:, None] & (byte[None, :] < BYTES)
    pair = tl.load(codes_ptr + row[:, None] * BYTES + byte[None, :], mask=inside, other=0).to(tl.int32)
    both = tl.join(pair & 15, pair >> 4)
    return tl.reshape(both, (both.shape[0], BLOCK_K))


@triton.jit
def grouped(part_ptr, row, channel, inside, INPUTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return what a group shares, of ``row`` [BLOCK_N] and ``channel`` [BLOCK_K]: [BLOCK_N, 1] or [BLOCK_N, BLOCK_K].

    A step of inputs that lies within one group reads one number for each row.
    """
    if GROUP % BLOCK_K == 0 or GROUP == INPUTS:
        place = row * (INPUTS // GROUP) + tl.min(channel, axis=0) // GROUP
        part = tl.load(part_ptr + place, mask=inside, other=0)[:, None]
    else:
        place = row[:, None] * (INPUTS // GROUP) + channel[None, :] // GROUP
        part = tl.load(part_ptr + place, mask=inside[:, None] & (channel[None, :] < INPUTS), other=0)
    return part


@triton.jit
def tile(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    row,
    start,
    inside_row,
    inside_channel,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return weights [BLOCK_N, BLOCK_K] of one expert, whose parts the pointers begin: dense as stored, else float32.

    ``row`` [BLOCK_N] are outputs, and inputs go from ``start`` on. What is not inside is zero in dense weights, and
    without meaning in the others, whose ``inside_channel`` is not read: what they multiply must be zero there.
    """
    channel = start + tl.arange(0, BLOCK_K)
    inside = inside_row[:, None] & inside_channel[None, :]
    if FORM == "dense":
        value = tl.load(codes_ptr + row[:, None] * INPUTS + channel[None, :], mask=inside, other=0.0)
    elif FORM == "turned":
        value = tl.load(codes_ptr + channel[None, :] * OUTPUTS + row[:, None], mask=inside, other=0.0)
    elif FORM == "int8" or FORM == "fp8":
        codes = tl.load(codes_ptr + row[:, None] * INPUTS + channel[None, :], mask=inside, other=0.0)
        value = codes.to(tl.float32)
    elif FORM == "int4":
        value = nibbles(codes_ptr, row, start, inside_row, (INPUTS + 1) // 2, BLOCK_K).to(tl.float32) - 8.0
    else:
        tl.static_assert(FORM == "mxfp4")
        value = e2m1(nibbles(codes_ptr, row, start, inside_row, INPUTS // 2, BLOCK_K))
    if FORM == "mxfp4":
        value *= e8m0(grouped(scale_ptr, row, channel, inside_row, INPUTS, GROUP, BLOCK_K).to(tl.int32))
    elif FORM == "int8" or FORM == "int4" or FORM == "fp8":
        value *= grouped(scale_ptr, row, channel, inside_row, INPUTS, GROUP, BLOCK_K).to(tl.float32)
        if SHIFTED:
            value += grouped(zero_ptr, row, channel, inside_row, INPUTS, GROUP, BLOCK_K).to(tl.float32)
    return value


@triton.jit
def expert_parts(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    expert,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return where codes, scales and zeros of one expert begin; offsets are 64 bit, since a layer may pass 2^31."""
    HALVED: tl.constexpr = FORM == "int4" or FORM == "mxfp4" or FORM == "mxfp4_scaled"
    BYTES: tl.constexpr = (INPUTS + 1) // 2 if HALVED else INPUTS
    ROWS: tl.constexpr = OUTPUTS // GROUP if FORM == "fp8_block" else OUTPUTS
    of_codes = expert.to(tl.int64) * (OUTPUTS * BYTES)
    of_scales = expert.to(tl.int64) * (ROWS * (INPUTS // GROUP))
    return codes_ptr + of_codes, scale_ptr + of_scales, zero_ptr + of_scales

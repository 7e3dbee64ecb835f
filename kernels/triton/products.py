"""One step of a grouped product: a block's rows by a tile of weights, in the arithmetic that their form asks for.

Codes are mostly turned into the activations' dtype first. ``fp8_block`` multiplies codes by codes (W8A8: e4m3, a
float32 scale for each 128 x 128 weights and for each 128 activations of a token: DeepSeek-V3, arXiv 2412.19437);
``mxfp4_scaled`` leaves MXFP4's codes and scales to the device (tl.dot_scaled), which no interpreter has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import launch
from .tiles import INTERPRETED_ROWS
from .weights import FP8_BLOCK, tile

if TYPE_CHECKING:
    from torch import Tensor


def fp8_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes [N, I] e4m3, scales [N, I / 128] float32): each 128 activations by their largest magnitude.

    I is a multiple of 128. A group of zeros has scale 0 and codes 0.
    """
    import torch

    rows, inputs = x_NI.shape
    codes_NI = x_NI.new_empty(rows, inputs, dtype=torch.float8_e4m3fn)
    scale_NG = x_NI.new_empty(rows, inputs // FP8_BLOCK, dtype=torch.float32)
    grid = (triton.cdiv(rows, INTERPRETED_ROWS.block_m), inputs // FP8_BLOCK)
    launch(fp8_kernel, grid, (x_NI, codes_NI, scale_NG, rows), INTERPRETED_ROWS, INPUTS=inputs, BLOCK_K=FP8_BLOCK)
    return codes_NI, scale_NG


@triton.jit
def fp8_kernel(x_ptr, codes_ptr, scale_ptr, rows, INPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Round one group of BLOCK_K activations of BLOCK_M rows to e4m3."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    here = row < rows
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = row[:, None] * INPUTS + channel[None, :]
    x = tl.load(x_ptr + place, mask=here[:, None], other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), axis=1) / 448.0
    code = x / tl.where(scale > 0.0, scale, 1.0)[:, None]
    code = tl.minimum(tl.maximum(code, -448.0), 448.0)
    tl.store(codes_ptr + place, code.to(codes_ptr.dtype.element_ty), mask=here[:, None])
    tl.store(scale_ptr + row * (INPUTS // BLOCK_K) + tl.program_id(1), scale, mask=here)


@triton.jit
def fp8_step(
    x, x_scale, codes_ptr, scale_ptr, row, start, inside_row, total, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return total + x w^T over one block of inputs: codes are multiplied, and their sum is scaled twice."""
    tl.static_assert(BLOCK_K == 128)
    channel = start + tl.arange(0, BLOCK_K)
    w = tl.load(codes_ptr + row[:, None] * INPUTS + channel[None, :], mask=inside_row[:, None], other=0.0)
    scale = tl.load(scale_ptr + row // BLOCK_K * (INPUTS // BLOCK_K) + start // BLOCK_K, mask=inside_row, other=0.0)
    return total + tl.dot(x, tl.trans(w)) * x_scale[:, None] * scale[None, :]


@triton.jit
def scaled_step(x, codes_ptr, scale_ptr, row, start, inside_row, total, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return total + x w^T of bfloat16 x and MXFP4 weights, by the device's own decoding."""
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)
    inside = inside_row[None, :] & (byte[:, None] < INPUTS // 2)
    w = tl.load(codes_ptr + row[None, :] * (INPUTS // 2) + byte[:, None], mask=inside, other=0)
    group = start // 32 + tl.arange(0, BLOCK_K // 32)
    inside = inside_row[:, None] & (group[None, :] < INPUTS // 32)
    scale = tl.load(scale_ptr + row[:, None] * (INPUTS // 32) + group[None, :], mask=inside, other=0)
    return tl.dot_scaled(x, None, "bf16", w, scale, "e2m1", total)


@triton.jit
def step(
    x,
    x_scale,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    row,
    start,
    inside_row,
    inside_channel,
    total,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return total + x w^T, of x [BLOCK_M, BLOCK_K] and the weights of outputs ``row`` from input ``start`` on.

    ``x_scale`` [BLOCK_M] is what ``fp8_block`` multiplies x by. Float32 is multiplied as it is, not as TF32.
    """
    if FORM == "fp8_block":
        total = fp8_step(x, x_scale, codes_ptr, scale_ptr, row, start, inside_row, total, INPUTS, BLOCK_K)
    elif FORM == "mxfp4_scaled":
        total = scaled_step(x, codes_ptr, scale_ptr, row, start, inside_row, total, INPUTS, BLOCK_K)
    else:
        w = tile(
            codes_ptr,
            scale_ptr,
            zero_ptr,
            row,
            start,
            inside_row,
            inside_channel,
            OUTPUTS,
            INPUTS,
            FORM,
            GROUP,
            SHIFTED,
            BLOCK_K,
        )
        total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
    return total

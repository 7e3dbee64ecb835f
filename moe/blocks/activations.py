"""Activations in 8 or 4 bits, one symmetric scale per token, and the integer product that W8A8 and W4A4 stand for.

A token's row is x = c * s with s = max|x| / (2^(b-1) - 1). With weights w = q * r, one scale r per output row, a
product is (sum of c q) * s * r: the sum is an exact integer, whoever computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tensor import nonzero

EXACT_FLOAT32 = 2**24
"""Integers up to here are exact in float32."""


def quantize_tokens(x_TI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes int8 [T, I] in -(2^(bits-1) - 1) .. 2^(bits-1) - 1 and their scales float32 [T, 1].

    Raises ValueError for less than 2 or more than 8 bits. A token of zeros has scale 0.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"activations are quantized to 2 to 8 bits, not {bits}; use 8 or 4.")
    top = 2 ** (bits - 1) - 1
    scale_T1 = x_TI.float().abs().amax(-1, keepdim=True) / top
    codes_TI = (x_TI.float() / nonzero(scale_T1)).round().clamp(-top, top).to(torch.int8)
    return codes_TI, scale_T1


def fake_quantize(x_TI: Tensor, bits: int) -> Tensor:
    """Return ``x_TI`` through ``quantize_tokens`` and back, in its own dtype."""
    codes_TI, scale_T1 = quantize_tokens(x_TI, bits)
    return (codes_TI.float() * scale_T1).to(x_TI.dtype)


def int_matmul(codes_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """Return the exact int32 products [T, O] of int8 codes: by torch's int8 kernel on a CPU, else by ``float_matmul``.

    CUDA's kernel of the same name refuses few tokens and odd sizes, so other devices take the exact floats; so does a
    single input channel, for which the CPU's leaves its output unwritten (pytorch issue 195066: it mistakes strides).
    """
    if codes_TI.device.type == "cpu" and codes_TI.shape[1] > 1:
        return torch._int_mm(_row_major(codes_TI), _row_major(codes_OI).T)
    return float_matmul(codes_TI, codes_OI)


def _row_major(codes: Tensor) -> Tensor:
    """Return a matrix with the strides that the kernel expects even of one row, where torch allows any."""
    return codes.contiguous().as_strided(codes.shape, (codes.shape[1], 1))


def float_matmul(codes_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """Return the same products by floats that hold every partial sum exactly: float32 while it can, else float64."""
    worst = 2**14 * codes_TI.shape[1]
    dtype = torch.float32 if worst <= EXACT_FLOAT32 else torch.float64
    return (codes_TI.to(dtype) @ codes_OI.to(dtype).T).to(torch.int32)


def int_linear(x_TI: Tensor, codes_OI: Tensor, scale_O: Tensor, bits: int = 8) -> Tensor:
    """Return x W^T [T, O] in the dtype of ``x_TI``: x quantized per token to ``bits``, W = codes * scale per row.

    ``codes_OI`` is int8 (a 4 bit code fits, too) and ``scale_O`` of any float dtype; the scales multiply in float32.
    """
    codes_TI, scale_T1 = quantize_tokens(x_TI, bits)
    return (int_matmul(codes_TI, codes_OI).float() * scale_T1 * scale_O.float()).to(x_TI.dtype)

"""Activations rounded to integers, each token by its own scale: what W8A8 and W4A4 read instead of the activations.

x is near code * scale with scale = max|x| / (2^(b-1) - 1) over the token's channels and a signed code of b bits:
dynamic, per token and symmetric, in the words of SmoothQuant (arXiv 2211.10438). There is one arithmetic for all: the
oracle, executions that round in floating point, and those that multiply the codes.
Shape letters: N tokens (or assignments), I channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_codes(x_NI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (codes_NI, scales_N1): whole numbers up to 2^(bits-1) - 1 either way, and what to multiply them by.

    Both are float32, or float64 for a float64 input: whoever begins with the same numbers gets the same codes. A token
    of zeros has scale 0 and codes 0.
    """
    x_NI = x_NI if x_NI.dtype == torch.float64 else x_NI.float()
    top = 2 ** (bits - 1) - 1
    scales_N1 = x_NI.abs().amax(-1, keepdim=True) / top
    codes_NI = x_NI / torch.where(scales_N1 > 0, scales_N1, torch.ones_like(scales_N1))
    return codes_NI.round().clamp(-top, top), scales_N1


def rounded_tokens(x_NI: Tensor, bits: int | None) -> Tensor:
    """Return code * scale in the dtype of ``x_NI``; with None the activations as they are."""
    if bits is None:
        return x_NI
    codes_NI, scales_N1 = token_codes(x_NI, bits)
    return (codes_NI * scales_N1).to(x_NI.dtype)


def exact_tokens(x_NI: Tensor, bits: int | None) -> Tensor:
    """Return code * scale in float64, which holds the product exactly where ``x_NI`` is no wider than float32."""
    if bits is None:
        return x_NI.double()
    codes_NI, scales_N1 = token_codes(x_NI, bits)
    return codes_NI.double() * scales_N1.double()


def near_ties(x_NI: Tensor, bits: int, error_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return (near_NI, step_N1): which activations lie so near the middle of two codes that an error may flip them.

    ``error_NI`` is what another execution's activations may be off by, and through the largest of a token its scale: by
    a part r, which makes (|x| r + error) / (1 - r) of the distance that counts. Two roundings to the nearest code
    differ by one step ``step_N1`` at most, beyond the error itself.
    """
    codes_NI, step_N1 = token_codes(x_NI, bits)
    size_NI = x_NI.abs()
    largest_N1 = size_NI.amax(-1, keepdim=True)
    most_N1 = (size_NI + error_NI).amax(-1, keepdim=True) - largest_N1
    least_N1 = largest_N1 - (size_NI - error_NI).amax(-1, keepdim=True)
    part_N1 = (torch.maximum(most_N1, least_N1) / torch.where(largest_N1 > 0, largest_N1, 1.0)).clamp(max=0.5)
    moved_NI = (size_NI * part_N1 + error_NI) / (1 - part_N1)
    from_code_NI = (x_NI - codes_NI * step_N1).abs()
    return (step_N1 > 0) & (from_code_NI + moved_NI >= step_N1 / 2), step_N1

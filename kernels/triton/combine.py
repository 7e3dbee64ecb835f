"""The rows of assignments added up into the rows of their tokens, in a fixed order.

Shape letters: T tokens, K slots, N assignments, E experts, H hidden, R parts of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import is_interpreted, launch
from .tiles import INTERPRETED_ROWS, ROWS

if TYPE_CHECKING:
    from torch import Tensor


def combine_slots(rows_NRH: Tensor, indices_TK: Tensor, experts: int, out_TH: Tensor) -> None:
    """Write to each token of ``out_TH`` the sum of its slots' rows, in their order; those that hold no expert count 0.

    ``rows_NRH`` float32, N = T K: each row in R parts.
    """
    _combine(rows_NRH, indices_TK, indices_TK, out_TH, indices_TK.shape[1], experts)


def combine_sorted(rows_NRH: Tensor, token_N: Tensor, out_TH: Tensor) -> None:
    """Write to each token of ``out_TH`` the sum of its assignments' rows, by expert."""
    import torch

    order_N = token_N.argsort(stable=True)
    ends = torch.arange(len(out_TH) + 1, device=token_N.device)
    bounds_T1 = torch.searchsorted(token_N[order_N], ends)
    _combine(rows_NRH, order_N, bounds_T1, out_TH, 0, 0)


def _combine(
    rows_NRH: Tensor, which_N: Tensor, bounds_T1: Tensor, out_TH: Tensor, slots_per_token: int, experts: int
) -> None:
    tokens, hidden = out_TH.shape
    tiles = INTERPRETED_ROWS if is_interpreted(combine_kernel) else ROWS
    block = min(tiles.block_n, triton.next_power_of_2(hidden))
    launch(
        combine_kernel,
        (triton.cdiv(tokens, tiles.block_m), triton.cdiv(hidden, block)),
        (rows_NRH, which_N, bounds_T1, out_TH, tokens),
        tiles,
        HIDDEN=hidden,
        PARTS=rows_NRH.shape[1],
        SLOTS=slots_per_token,
        EXPERTS=experts,
        BLOCK_N=block,
    )


@triton.jit
def combine_kernel(
    rows_ptr,
    which_ptr,
    bounds_ptr,
    out_ptr,
    tokens,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up each token's rows: those of its SLOTS slots, or (SLOTS 0) those that ``which`` names within its bounds."""
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    here = token < tokens
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = channel < HIDDEN
    if SLOTS > 0:
        begin = token * SLOTS
        end = begin + SLOTS
        most = SLOTS
    else:
        begin = tl.load(bounds_ptr + token, mask=here, other=0)
        end = tl.load(bounds_ptr + token + 1, mask=here, other=0)
        most = tl.max(end - begin, axis=0).to(tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(0, most):
        place = begin + number
        which = tl.load(which_ptr + place, mask=here & (place < end), other=-1)
        real = which >= 0
        if SLOTS > 0:
            real = real & (which < EXPERTS)
            which = place
        row = which[:, None] * (PARTS * HIDDEN) + channel[None, :]
        for part in tl.static_range(PARTS):
            total += tl.load(rows_ptr + row + part * HIDDEN, mask=real[:, None] & inside[None, :], other=0.0)
    out = out_ptr + token[:, None] * HIDDEN + channel[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])

"""The rows of assignments added up into the rows of their tokens, in a fixed order.

Shape letters: T tokens, K slots, N assignments, E experts, H hidden, R parts of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import launch
from .tiles import ROWS

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
    block = min(ROWS.block_n, triton.next_power_of_2(hidden))
    launch(
        combine_kernel,
        (tokens, triton.cdiv(hidden, block)),
        (rows_NRH, which_N, bounds_T1, out_TH),
        ROWS,
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
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up the rows of one token: those of its SLOTS slots, or (SLOTS 0) those that ``which`` names between bounds."""
    token = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = channel < HIDDEN
    if SLOTS > 0:
        begin = token * SLOTS
        end = begin + SLOTS
    else:
        begin = tl.load(bounds_ptr + token).to(tl.int32)
        end = tl.load(bounds_ptr + token + 1).to(tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for place in range(begin, end):
        which = tl.load(which_ptr + place)
        if SLOTS > 0:
            real = (which >= 0) & (which < EXPERTS)
            row = (tl.zeros((BLOCK_N,), tl.int64) + place) * (PARTS * HIDDEN)
        else:
            real = which >= 0
            row = (tl.zeros((BLOCK_N,), tl.int64) + which) * (PARTS * HIDDEN)
        for part in tl.static_range(PARTS):
            total += tl.load(rows_ptr + row + part * HIDDEN + channel, mask=inside & real, other=0.0)
    row_of_token = token.to(tl.int64) * HIDDEN
    tl.store(out_ptr + row_of_token + channel, total.to(out_ptr.dtype.element_ty), mask=inside)

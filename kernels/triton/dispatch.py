"""Assignments sorted by expert and cut into blocks, on the device: nothing comes back to the host.

The products of grouped.py take blocks of BLOCK_M positions that all belong to one expert; an expert's last block is
padded. The host knows how many assignments there are at most, not how they fall on experts, and so launches as many
blocks as there can be (``most_blocks``); those beyond ``blocks_1`` return at once.

Every program sorts for one expert and looks at all slots, twice: the order is that of the slots, without atomics.
Shape letters: T tokens, K slots, S = T K, N assignments, E experts, B blocks, P = B BLOCK_M positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from .launch import launch
from .tiles import ROWS, Tiles

if TYPE_CHECKING:
    from torch import Tensor


class Blocks(NamedTuple):
    """Where each position's row of x lies, and whose weights each block reads; int32, on the device.

    ``assignment_P`` is the slot (or the sorted assignment) of a position, ``num_assignments`` where it is padding, for
    which ``token_P`` is not written. ``expert_B`` is written for the first ``blocks_1[0]`` blocks. ``range_E2`` is each
    expert's first block and how many it has.
    """

    assignment_P: Tensor
    token_P: Tensor
    expert_B: Tensor
    blocks_1: Tensor
    range_E2: Tensor
    num_assignments: int


def most_blocks(assignments: int, experts: int, block: int) -> int:
    """Return how many blocks ``assignments`` can fall into, however they fall on ``experts``."""
    return (assignments + min(assignments, experts) * (block - 1)) // block


def blocks_of_slots(indices_TK: Tensor, experts: int, tiles: Tiles) -> Blocks:
    """Sort slots by expert; those whose index is no expert (E pads) have no position."""
    slots = indices_TK.numel()
    blocks = _empty(indices_TK, slots, experts, tiles)
    count_E = indices_TK.new_empty(experts, dtype=blocks.expert_B.dtype)
    launch(count_kernel, (experts,), (indices_TK, count_E, slots), ROWS, BLOCK_N=_power(slots))
    launch(
        place_kernel,
        (experts,),
        (indices_TK, count_E, *blocks[:5], slots, indices_TK.shape[1]),
        ROWS,
        EXPERTS=experts,
        EXPERTS_POWER=triton.next_power_of_2(experts),
        BLOCK_M=tiles.block_m,
        BLOCK_N=_power(slots),
    )
    return blocks


def blocks_of_sorted(token_N: Tensor, offsets_E1: Tensor, tiles: Tiles) -> Blocks:
    """Cut assignments that are sorted by expert already into blocks."""
    assignments, experts = len(token_N), len(offsets_E1) - 1
    blocks = _empty(token_N, assignments, experts, tiles)
    launch(
        cut_kernel,
        (experts,),
        (token_N, offsets_E1, *blocks[:5], assignments),
        ROWS,
        EXPERTS=experts,
        EXPERTS_POWER=triton.next_power_of_2(experts),
        BLOCK_M=tiles.block_m,
        BLOCK_N=_power(assignments),
    )
    return blocks


def _empty(like: Tensor, assignments: int, experts: int, tiles: Tiles) -> Blocks:
    import torch

    most = most_blocks(assignments, experts, tiles.block_m)
    shapes = ((most * tiles.block_m,), (most * tiles.block_m,), (most,), (1,), (experts, 2))
    made = [like.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return Blocks(made[0], made[1], made[2], made[3], made[4], assignments)


def _power(slots: int) -> int:
    """Return how many slots a program looks at in one step."""
    return min(ROWS.block_n, max(16, 1 << max(slots - 1, 0).bit_length()))


@triton.jit
def count_kernel(index_ptr, count_ptr, slots, BLOCK_N: tl.constexpr):
    """Count the slots of one expert."""
    expert = tl.program_id(0)
    counted = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, slots, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        index = tl.load(index_ptr + slot, mask=slot < slots, other=-1)
        counted += (index == expert).to(tl.int32)
    tl.store(count_ptr + expert, tl.sum(counted, axis=0))


@triton.jit
def first_block(counts, experts, expert, blocks_ptr, BLOCK_M: tl.constexpr):
    """Return one expert's first block and the number of its blocks; the first program tells how many all have."""
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    if expert == 0:
        tl.store(blocks_ptr, tl.sum(blocks, axis=0))
    first = tl.sum(tl.where(experts < expert, blocks, 0), axis=0)
    mine = tl.sum(tl.where(experts == expert, blocks, 0), axis=0)
    return first, mine


@triton.jit
def name_blocks(expert_ptr, range_ptr, expert, first, mine, BLOCK_N: tl.constexpr):
    """Write whose weights an expert's blocks read, and which blocks they are."""
    tl.store(range_ptr + 2 * expert, first)
    tl.store(range_ptr + 2 * expert + 1, mine)
    for start in range(0, mine, BLOCK_N):
        block = start + tl.arange(0, BLOCK_N)
        tl.store(expert_ptr + first + block, tl.zeros((BLOCK_N,), tl.int32) + expert, mask=block < mine)


@triton.jit
def pad_block(assignment_ptr, begin, end, nothing, BLOCK_M: tl.constexpr):
    """Write ``nothing`` for the positions from ``begin`` to ``end``, less than a block."""
    position = begin + tl.arange(0, BLOCK_M)
    tl.store(assignment_ptr + position, tl.zeros((BLOCK_M,), tl.int32) + nothing, mask=position < end)


@triton.jit
def place_kernel(
    index_ptr,
    count_ptr,
    assignment_ptr,
    token_ptr,
    expert_ptr,
    blocks_ptr,
    range_ptr,
    slots,
    slots_per_token,
    EXPERTS: tl.constexpr,
    EXPERTS_POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the slots of one expert to its positions, in their order."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_POWER)
    counts = tl.load(count_ptr + experts, mask=experts < EXPERTS, other=0)
    first, mine = first_block(counts, experts, expert, blocks_ptr, BLOCK_M)
    place = first * BLOCK_M
    for start in range(0, slots, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        index = tl.load(index_ptr + slot, mask=slot < slots, other=-1)
        here = (index == expert).to(tl.int32)
        position = place + tl.cumsum(here, axis=0) - 1
        tl.store(assignment_ptr + position, slot, mask=here > 0)
        tl.store(token_ptr + position, slot // slots_per_token, mask=here > 0)
        place += tl.sum(here, axis=0)
    pad_block(assignment_ptr, place, (first + mine) * BLOCK_M, slots, BLOCK_M)
    name_blocks(expert_ptr, range_ptr, expert, first, mine, BLOCK_N)


@triton.jit
def cut_kernel(
    sorted_ptr,
    offset_ptr,
    assignment_ptr,
    token_ptr,
    expert_ptr,
    blocks_ptr,
    range_ptr,
    assignments,
    EXPERTS: tl.constexpr,
    EXPERTS_POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the sorted assignments of one expert to its positions."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_POWER)
    known = experts < EXPERTS
    counts = tl.load(offset_ptr + experts + 1, mask=known, other=0) - tl.load(offset_ptr + experts, mask=known, other=0)
    first, mine = first_block(counts, experts, expert, blocks_ptr, BLOCK_M)
    begin = tl.load(offset_ptr + expert)
    count = tl.load(offset_ptr + expert + 1) - begin
    for start in range(0, count, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        inside = place < count
        token = tl.load(sorted_ptr + begin + place, mask=inside, other=0).to(tl.int32)
        tl.store(assignment_ptr + first * BLOCK_M + place, begin + place, mask=inside)
        tl.store(token_ptr + first * BLOCK_M + place, token, mask=inside)
    pad_block(assignment_ptr, first * BLOCK_M + count, (first + mine) * BLOCK_M, assignments, BLOCK_M)
    name_blocks(expert_ptr, range_ptr, expert, first, mine, BLOCK_N)

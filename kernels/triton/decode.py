"""Few tokens: one product of a matrix and a vector for each slot, its inputs split over programs.

Sums over splits are taken in a fixed order, by whoever reads them: down adds up what gate and up have left, the
combination adds up what down has left. A channel that a threshold leaves out is not loaded: with weights that are
``turned`` what one input channel needs lies in one piece, and is left in memory (TEAL, arXiv 2408.14690; CATS,
arXiv 2404.08763). Shape letters: T tokens, K slots, S slots (or assignments) of a call, E experts, H hidden, F width,
R rows of gate_up (2F, or F without a gate), P splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .elementwise import activated, used
from .grouped import Experts
from .launch import launch
from .tiles import Tiles, splits_of
from .weights import expert_parts, tile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Whose rows are multiplied by whose weights, and how much they count.

    ``expert_S`` int64 (no expert: the slot is left out); ``token_S`` int64, or None where slot s is of token
    s // ``per_token``; ``weight_S`` float32.
    """

    expert_S: Tensor
    weight_S: Tensor
    token_S: Tensor | None = None
    per_token: int = 1


def decoded_rows(x_TH: Tensor, slots: Slots, experts: Experts, tiles: Tiles, splits: int | None = None) -> Tensor:
    """Return w * f_e(x) of every slot in parts [S, P, H] float32, to be added up; not written where it has no expert.

    ``splits`` None takes as many as ``tiles.splits_of`` says.
    """
    import torch

    count, rows = slots.expert_S.numel(), experts.gate_up.outputs
    outputs_of = (triton.cdiv(rows, tiles.block_n), triton.cdiv(experts.hidden_size, tiles.block_n))
    first, second = (
        splits_of(count * outputs, triton.cdiv(inputs, tiles.block_k)) if splits is None else splits
        for outputs, inputs in zip(outputs_of, (experts.hidden_size, experts.width), strict=True)
    )
    partial_SPR = x_TH.new_empty(count, first, rows, dtype=torch.float32)
    row_SPH = x_TH.new_empty(count, second, experts.hidden_size, dtype=torch.float32)
    token_S = slots.expert_S if slots.token_S is None else slots.token_S
    shared = {
        "HIDDEN": experts.hidden_size,
        "WIDTH": experts.width,
        "EXPERTS": experts.num_experts,
        "GATED": experts.gated,
    }
    site_args, rules = experts.sites(x_TH, "input")
    launch(
        decode_up_kernel,
        (count, outputs_of[0], first),
        (x_TH, *experts.gate_up.pointers, partial_SPR, slots.expert_S, token_S, *site_args),
        tiles,
        SLOTS=0 if slots.token_S is not None else slots.per_token,
        SPLITS=first,
        **shared,
        **experts.gate_up.constants,
        **rules,
    )
    site_args, rules = experts.sites(x_TH, "gate", "hidden")
    launch(
        decode_down_kernel,
        (count, outputs_of[1], second),
        (partial_SPR, *experts.down.pointers, row_SPH, slots.expert_S, slots.weight_S, *site_args),
        tiles,
        PARTS=first,
        SPLITS=second,
        ACTIVATION=experts.activation,
        DTYPE=getattr(tl, str(x_TH.dtype).removeprefix("torch.")),
        **shared,
        **experts.down.constants,
        **rules,
    )
    return row_SPH


@triton.jit
def decode_up_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    partial_ptr,
    index_ptr,
    token_ptr,
    input_weight_ptr,
    input_threshold,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    INPUT_RULE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write gate x and up x of one slot, over one split of the inputs."""
    slot = tl.program_id(0)
    expert = tl.load(index_ptr + slot)
    if (expert < 0) | (expert >= EXPERTS):
        return
    OUTPUTS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    STEP: tl.constexpr = (HIDDEN + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    token = (slot // SLOTS).to(tl.int64) if SLOTS > 0 else tl.load(token_ptr + slot)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < OUTPUTS
    codes, scale, zero = expert_parts(codes_ptr, scale_ptr, zero_ptr, expert, OUTPUTS, HIDDEN, FORM, GROUP)
    begin = tl.program_id(2) * STEP
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, min(begin + STEP, HIDDEN), BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        known = channel < HIDDEN
        x = tl.load(x_ptr + token * HIDDEN + channel, mask=known, other=0.0).to(tl.float32)
        keep = used(x, input_weight_ptr, channel, known, input_threshold, INPUT_RULE)
        w = tile(codes, scale, zero, row, start, inside, keep, OUTPUTS, HIDDEN, FORM, GROUP, SHIFTED, BLOCK_K)
        total += tl.sum(w.to(tl.float32) * tl.where(keep, x, 0.0)[None, :], axis=1)
    part = (slot * SPLITS + tl.program_id(2)).to(tl.int64)
    tl.store(partial_ptr + part * OUTPUTS + row, total, mask=inside)


@triton.jit
def added(partial_ptr, unit, inside, OUTPUTS: tl.constexpr, PARTS: tl.constexpr):
    """Return the sum of the parts of a product, in their order."""
    total = tl.zeros(unit.shape, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial_ptr + part * OUTPUTS + unit, mask=inside, other=0.0)
    return total


@triton.jit
def decode_down_kernel(
    partial_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    row_ptr,
    index_ptr,
    weight_ptr,
    gate_weight_ptr,
    gate_threshold,
    hidden_weight_ptr,
    hidden_threshold,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    GATE_RULE: tl.constexpr,
    HIDDEN_RULE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write weight * down(act(gate) * up) of one slot, over one split of the units."""
    slot = tl.program_id(0)
    expert = tl.load(index_ptr + slot)
    if (expert < 0) | (expert >= EXPERTS):
        return
    OUTPUTS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    STEP: tl.constexpr = (WIDTH + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    partial_ptr += slot.to(tl.int64) * (PARTS * OUTPUTS)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = output < HIDDEN
    codes, scale, zero = expert_parts(codes_ptr, scale_ptr, zero_ptr, expert, HIDDEN, WIDTH, FORM, GROUP)
    begin = tl.program_id(2) * STEP
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, min(begin + STEP, WIDTH), BLOCK_K):
        unit = start + tl.arange(0, BLOCK_K)
        known = unit < WIDTH
        hidden = activated(added(partial_ptr, unit, known, OUTPUTS, PARTS), ACTIVATION)
        if GATED:
            keep = used(hidden, gate_weight_ptr, unit, known, gate_threshold, GATE_RULE)
            hidden = tl.where(keep, hidden, 0.0) * added(partial_ptr, unit + WIDTH, known, OUTPUTS, PARTS)
        keep = used(hidden, hidden_weight_ptr, unit, known, hidden_threshold, HIDDEN_RULE)
        read = tl.where(keep, hidden, 0.0).to(DTYPE).to(tl.float32)
        w = tile(codes, scale, zero, output, start, inside, keep, HIDDEN, WIDTH, FORM, GROUP, SHIFTED, BLOCK_K)
        total += tl.sum(w.to(tl.float32) * read[None, :], axis=1)
    part = (slot * SPLITS + tl.program_id(2)).to(tl.int64)
    tl.store(row_ptr + part * HIDDEN + output, total * tl.load(weight_ptr + slot), mask=inside)

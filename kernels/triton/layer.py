"""Routed experts of one layer: which kernels run, in which order. No data comes back to the host.

Shape letters: T tokens, K slots, N assignments, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .combine import combine_slots, combine_sorted
from .decode import Slots, decoded_rows
from .dispatch import Blocks, blocks_of_slots, blocks_of_sorted
from .grouped import Experts, down_of, hidden_of
from .tiles import DECODE, Tiles

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["atomic", "deterministic"]


@dataclass(frozen=True)
class Plan:
    """How a call is run: the tiles of its two products, and how rows become tokens.

    Calls of at most ``decode_tokens`` tokens multiply slot by slot instead, by tiles ``decode`` and always in a fixed
    order, over ``splits`` parts of the inputs (None: as the number of programs asks for).
    """

    gate_up: Tiles
    down: Tiles
    combine: Combine = "deterministic"
    decode_tokens: int = 0
    decode: Tiles = DECODE
    splits: int | None = None

    def __post_init__(self) -> None:
        if self.gate_up.block_m != self.down.block_m:
            raise ValueError("both products read the same blocks; give their tiles the same block_m")


def topk_layer(
    x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor, experts: Experts, out_TH: Tensor, plan: Plan
) -> None:
    """Write sum_k w_tk f_e(x_t) to ``out_TH``; slots whose index is no expert count nothing.

    ``x_TH`` and ``out_TH`` of one dtype, ``indices_TK`` int64, ``weights_TK`` float32; all contiguous, on one device.
    """
    if _goes_slot_by_slot(x_TH, experts, plan):
        slots = Slots(indices_TK, weights_TK, per_token=indices_TK.shape[1])
        parts_NPH = decoded_rows(x_TH, slots, experts, plan.decode, plan.splits)
        combine_slots(parts_NPH, indices_TK, experts.num_experts, out_TH)
        return
    blocks = blocks_of_slots(indices_TK, experts.num_experts, plan.gate_up)
    rows = _rows(x_TH, weights_TK, experts, blocks, out_TH, plan)
    if rows is not None:
        combine_slots(rows, indices_TK, experts.num_experts, out_TH)


def sorted_layer(
    x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor, experts: Experts, out_TH: Tensor, plan: Plan
) -> None:
    """Write sum_n w_n f_e(x_t) to ``out_TH``: ``token_N`` int64, ``offsets_E1`` int32, ``weight_N`` float32."""
    if _goes_slot_by_slot(x_TH, experts, plan):
        slots = Slots(_experts_of(token_N, offsets_E1), weight_N, token_N)
        combine_sorted(decoded_rows(x_TH, slots, experts, plan.decode, plan.splits), token_N, out_TH)
        return
    blocks = blocks_of_sorted(token_N, offsets_E1, plan.gate_up)
    rows = _rows(x_TH, weight_N, experts, blocks, out_TH, plan)
    if rows is not None:
        combine_sorted(rows, token_N, out_TH)


def _goes_slot_by_slot(x_TH: Tensor, experts: Experts, plan: Plan) -> bool:
    as_codes = experts.gate_up.multiplied_as_codes or experts.down.multiplied_as_codes
    return len(x_TH) <= plan.decode_tokens and not as_codes


def _experts_of(token_N: Tensor, offsets_E1: Tensor) -> Tensor:
    """Return the expert of each sorted assignment, int64."""
    import torch

    places = torch.arange(len(token_N), device=token_N.device, dtype=offsets_E1.dtype)
    return torch.searchsorted(offsets_E1[1:], places, right=True)


def _rows(
    x_TH: Tensor, weight_N: Tensor, experts: Experts, blocks: Blocks, out_TH: Tensor, plan: Plan
) -> Tensor | None:
    """Return the weighted rows of assignments [N, 1, H] float32; None where atomics have added them up already."""
    import torch

    hidden_NF = hidden_of(x_TH, experts, blocks, plan.gate_up)
    atomic = plan.combine == "atomic"
    if atomic:
        out = x_TH.new_zeros(out_TH.shape, dtype=torch.float32)
    else:
        out = x_TH.new_empty(blocks.num_assignments, experts.hidden_size, dtype=torch.float32)
    down_of(hidden_NF, weight_N, out, experts, blocks, plan.down, atomic)
    if not atomic:
        return out[:, None]
    out_TH.copy_(out)
    return None

"""Gradients of the grouped layer, for dense experts without sparsity.

Every product is grouped like those of the forward pass: rows of assignments by a matrix of their expert, or by its
transpose, which is the same bytes read the other way (form ``turned``); what is between products is torch's, in
float32. A weight's gradient is a sum over its expert's assignments, in their order. No data comes back to the host.
Shape letters: T tokens, N assignments (slots that hold no expert included), E experts, H hidden, F width,
R rows of gate_up, O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from .dispatch import Blocks
from .grouped import Experts, down_of
from .launch import is_interpreted, launch
from .tiles import GRADIENT, Tiles, interpreted
from .weights import Matrices

if TYPE_CHECKING:
    from torch import Tensor


class Assigned(NamedTuple):
    """The assignments of a call: ``token_N`` int64, ``weight_N`` float32, ``real_N`` bool (holds an expert)."""

    token_N: Tensor
    weight_N: Tensor
    real_N: Tensor


class Gradients(NamedTuple):
    """``rows_NH`` float32 are to be added up into tokens; those of the matrices are in their dtype."""

    rows_NH: Tensor
    gate_up: Tensor
    down: Tensor
    weight_N: Tensor


def gradients(
    x_TH: Tensor,
    grad_TH: Tensor,
    experts: Experts,
    assigned: Assigned,
    blocks: Blocks,
    tiles: Tiles,
    hidden_from: Callable[[Tensor], Tensor],
) -> Gradients:
    """Return the gradients of sum(y * ``grad_TH``).

    ``hidden_from`` is what experts do between products, [N, R] to [N, F] in float32, and open to autograd.
    """
    import torch

    x_NH, grad_NH = x_TH[assigned.token_N], grad_TH[assigned.token_N]
    gate_up, down = experts.gate_up, experts.down
    gate_up_turned = Matrices(gate_up.codes, "turned", gate_up.inputs, gate_up.outputs)
    down_turned = Matrices(down.codes, "turned", down.inputs, down.outputs)
    real_N1 = assigned.real_N[:, None]
    product_NR = _rows(x_NH, gate_up, experts, blocks, tiles).where(real_N1, 0.0)
    back_NF = _rows(grad_NH, down_turned, experts, blocks, tiles).where(real_N1, 0.0)
    with torch.enable_grad():
        leaf_NR = product_NR.requires_grad_()
        hidden_NF = hidden_from(leaf_NR)
        (grad_NR,) = torch.autograd.grad(hidden_NF, leaf_NR, back_NF * assigned.weight_N[:, None])
    hidden_NF, grad_NR = hidden_NF.detach(), grad_NR.to(x_TH.dtype)
    weighted_NH = (grad_NH.float() * assigned.weight_N[:, None]).to(x_TH.dtype)
    return Gradients(
        _rows(grad_NR, gate_up_turned, experts, blocks, tiles),
        _outer(grad_NR, x_NH, gate_up.codes, blocks, tiles),
        _outer(weighted_NH, hidden_NF.to(x_TH.dtype), down.codes, blocks, tiles),
        (hidden_NF * back_NF).sum(1),
    )


def _rows(row_NI: Tensor, matrices: Matrices, experts: Experts, blocks: Blocks, tiles: Tiles) -> Tensor:
    """Return each assignment's row times the matrix of its expert, [N, O] float32; not written where it has none."""
    import torch

    out_NO = row_NI.new_empty(len(row_NI), matrices.outputs, dtype=torch.float32)
    ones_N = row_NI.new_ones(len(row_NI), dtype=torch.float32)
    down_of(row_NI.contiguous(), ones_N, out_NO, replace(experts, down=matrices), blocks, tiles, atomic=False)
    return out_NO


def _outer(left_NO: Tensor, right_NI: Tensor, like_EOI: Tensor, blocks: Blocks, tiles: Tiles) -> Tensor:
    """Return sum_n left_n right_n^T over the assignments of each expert, like the matrix whose gradient it is."""
    grad_EOI = like_EOI.new_empty(like_EOI.shape)
    experts, outputs, inputs = like_EOI.shape
    chosen = GRADIENT
    if is_interpreted(outer_kernel):
        covering = interpreted(inputs, outputs)
        chosen = Tiles(covering.block_k, covering.block_n)
    launch(
        outer_kernel,
        (experts, triton.cdiv(outputs, chosen.block_m), triton.cdiv(inputs, chosen.block_n)),
        (left_NO, right_NI, grad_EOI, blocks.assignment_P, blocks.range_E2, blocks.num_assignments),
        chosen,
        OUTPUTS=outputs,
        INPUTS=inputs,
        BLOCK_K=tiles.block_m,
    )
    return grad_EOI


@triton.jit
def outer_kernel(
    left_ptr,
    right_ptr,
    grad_ptr,
    assignment_ptr,
    range_ptr,
    assignments,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a tile of one expert's gradient: a step is one of its blocks of BLOCK_K positions."""
    expert = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(range_ptr + 2 * expert)
    blocks = tl.load(range_ptr + 2 * expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, first + blocks):
        assignment = tl.load(assignment_ptr + block * BLOCK_K + tl.arange(0, BLOCK_K))
        real = assignment < assignments
        row = assignment.to(tl.int64)[:, None]
        inside = real[:, None] & (output < OUTPUTS)[None, :]
        left = tl.load(left_ptr + row * OUTPUTS + output[None, :], mask=inside, other=0.0)
        inside = real[:, None] & (channel < INPUTS)[None, :]
        right = tl.load(right_ptr + row * INPUTS + channel[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    place = (expert.to(tl.int64) * OUTPUTS + output)[:, None] * INPUTS + channel[None, :]
    inside = (output < OUTPUTS)[:, None] & (channel < INPUTS)[None, :]
    tl.store(grad_ptr + place, total.to(grad_ptr.dtype.element_ty), mask=inside)

"""Two grouped products over blocks of assignments (dispatch.py): gather, gate and up, activation; down, weighting.

A program multiplies the rows of one block by a tile of its expert's weights. Sums are float32; float32 inputs are
multiplied as they are, not as TF32. Shape letters: T tokens, N assignments, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .dispatch import Blocks
from .elementwise import activated, used
from .launch import launch
from .products import fp8_rows, step
from .tiles import Tiles
from .weights import FP8_BLOCK, Matrices, expert_parts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Site:
    """Which channels of a site are used: those whose |a_j| * weight_j is above ``threshold``; weights None are ones."""

    threshold: float
    weight: Tensor | None = None


@dataclass(frozen=True)
class Experts:
    """All experts of one layer: their matrices, their activation, and what is left out at input, gate and hidden."""

    gate_up: Matrices
    down: Matrices
    activation: str = "silu"
    gated: bool = True
    input: Site | None = None
    gate: Site | None = None
    hidden: Site | None = None

    def __post_init__(self) -> None:
        if self.input is not None and self.gate_up.form == "fp8_block":
            raise ValueError("fp8_block rounds activations before a threshold could see them; use another form")

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.down.outputs

    @property
    def width(self) -> int:
        """F."""
        return self.down.inputs

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.down.codes.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.gate_up.nbytes + self.down.nbytes

    def sites(self, absent: Tensor, *names: str) -> tuple[tuple[object, ...], dict[str, str]]:
        """Return (weight pointer, threshold) of each named site, ``absent`` where it has no weights, and its rules."""
        args: list[object] = []
        rules = {}
        for name in names:
            site: Site | None = getattr(self, name)
            weight = None if site is None else site.weight
            args += [absent if weight is None else weight, 0.0 if site is None else site.threshold]
            rules[f"{name.upper()}_RULE"] = "all" if site is None else "threshold" if weight is None else "weighted"
        return tuple(args), rules


def hidden_of(x_TH: Tensor, experts: Experts, blocks: Blocks, tiles: Tiles) -> Tensor:
    """Return what down reads, [N, F] in the dtype of ``x_TH``; rows of slots that hold no expert are not written."""
    hidden_NF = x_TH.new_empty(blocks.num_assignments, experts.width)
    site_args, rules = experts.sites(x_TH, "input", "gate", "hidden")
    grid = (len(blocks.expert_B), triton.cdiv(experts.width, tiles.block_n))
    tiles, read = _read(x_TH, experts.gate_up, tiles)
    args = (*read, *experts.gate_up.pointers, hidden_NF, *blocks[:4], *site_args, blocks.num_assignments)
    launch(
        gate_up_kernel,
        grid,
        args,
        tiles,
        HIDDEN=experts.hidden_size,
        WIDTH=experts.width,
        ACTIVATION=experts.activation,
        GATED=experts.gated,
        **experts.gate_up.constants,
        **rules,
    )
    return hidden_NF


def down_of(
    hidden_NF: Tensor, weight_N: Tensor, out: Tensor, experts: Experts, blocks: Blocks, tiles: Tiles, atomic: bool
) -> None:
    """Write weight * down(hidden) in float32 to the rows of assignments of ``out`` [N, H], or add it to tokens.

    With ``atomic`` the rows of ``out`` [T, H] are tokens, and the order of additions is not fixed.
    """
    grid = (len(blocks.expert_B), triton.cdiv(experts.hidden_size, tiles.block_n))
    tiles, read = _read(hidden_NF, experts.down, tiles)
    args = (*read, *experts.down.pointers, weight_N, out, *blocks[:4], blocks.num_assignments)
    launch(
        down_kernel,
        grid,
        args,
        tiles,
        HIDDEN=experts.hidden_size,
        WIDTH=experts.width,
        ATOMIC=atomic,
        **experts.down.constants,
    )


def _read(x_NI: Tensor, matrices: Matrices, tiles: Tiles) -> tuple[Tiles, tuple[Tensor, Tensor]]:
    """Return the tiles, and (activations, their scales) as a product with ``matrices`` reads them."""
    if matrices.form == "fp8_block":
        return replace(tiles, block_k=FP8_BLOCK), fp8_rows(x_NI)
    if matrices.form == "mxfp4_scaled" and str(x_NI.dtype) != "torch.bfloat16":
        raise ValueError(f"mxfp4_scaled multiplies bfloat16 activations, not {x_NI.dtype}; use the form mxfp4")
    return tiles, (x_NI, x_NI)


@triton.jit
def scales_of(scale_ptr, row, start, real, INPUTS: tl.constexpr, FORM: tl.constexpr):
    """Return what one step's activations are multiplied by; without meaning where they are no codes."""
    if FORM == "fp8_block":
        scale = tl.load(scale_ptr + row.to(tl.int64) * (INPUTS // 128) + start // 128, mask=real, other=0.0)
    else:
        scale = 0.0
    return scale


@triton.jit
def gate_up_kernel(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    hidden_ptr,
    assignment_ptr,
    token_ptr,
    expert_ptr,
    blocks_ptr,
    input_weight_ptr,
    input_threshold,
    gate_weight_ptr,
    gate_threshold,
    hidden_weight_ptr,
    hidden_threshold,
    assignments,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    INPUT_RULE: tl.constexpr,
    GATE_RULE: tl.constexpr,
    HIDDEN_RULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a tile of act(gate x) * up x (act(up x) where experts have no gate)."""
    block = tl.program_id(0)
    if block >= tl.load(blocks_ptr):
        return
    OUTPUTS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    expert = tl.load(expert_ptr + block)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    assignment = tl.load(assignment_ptr + position)
    real = assignment < assignments
    token = tl.load(token_ptr + position, mask=real, other=0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = unit < WIDTH
    codes, scale, zero = expert_parts(codes_ptr, scale_ptr, zero_ptr, expert, OUTPUTS, HIDDEN, FORM, GROUP)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        known = channel < HIDDEN
        here = real[:, None] & known[None, :]
        x = tl.load(x_ptr + token[:, None] * HIDDEN + channel[None, :], mask=here, other=0.0)
        if INPUT_RULE != "all":
            keep = used(x.to(tl.float32), input_weight_ptr, channel[None, :], here, input_threshold, INPUT_RULE)
            x = tl.where(keep, x, 0.0).to(x.dtype)
        xs = scales_of(x_scale_ptr, token, start, real, HIDDEN, FORM)
        w = (codes, scale, zero)
        first = step(x, xs, *w, unit, start, inside, known, first, OUTPUTS, HIDDEN, FORM, GROUP, SHIFTED, BLOCK_K)
        if GATED:
            up = unit + WIDTH
            second = step(x, xs, *w, up, start, inside, known, second, OUTPUTS, HIDDEN, FORM, GROUP, SHIFTED, BLOCK_K)
    here = real[:, None] & inside[None, :]
    hidden = activated(first, ACTIVATION)
    if GATED:
        keep = used(hidden, gate_weight_ptr, unit[None, :], here, gate_threshold, GATE_RULE)
        hidden = tl.where(keep, hidden, 0.0) * second
    keep = used(hidden, hidden_weight_ptr, unit[None, :], here, hidden_threshold, HIDDEN_RULE)
    hidden = tl.where(keep, hidden, 0.0).to(hidden_ptr.dtype.element_ty)
    row = assignment.to(tl.int64)[:, None] * WIDTH
    tl.store(hidden_ptr + row + unit[None, :], hidden, mask=here)


@triton.jit
def down_kernel(
    hidden_ptr,
    hidden_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    weight_ptr,
    out_ptr,
    assignment_ptr,
    token_ptr,
    expert_ptr,
    blocks_ptr,
    assignments,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ATOMIC: tl.constexpr,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write, or add, a tile of the weighted outputs of one expert."""
    block = tl.program_id(0)
    if block >= tl.load(blocks_ptr):
        return
    expert = tl.load(expert_ptr + block)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    assignment = tl.load(assignment_ptr + position)
    real = assignment < assignments
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = output < HIDDEN
    codes, scale, zero = expert_parts(codes_ptr, scale_ptr, zero_ptr, expert, HIDDEN, WIDTH, FORM, GROUP)
    row = assignment.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        unit = start + tl.arange(0, BLOCK_K)
        known = unit < WIDTH
        here = real[:, None] & known[None, :]
        hidden = tl.load(hidden_ptr + row * WIDTH + unit[None, :], mask=here, other=0.0)
        hs = scales_of(hidden_scale_ptr, assignment, start, real, WIDTH, FORM)
        w = (codes, scale, zero)
        total = step(hidden, hs, *w, output, start, inside, known, total, HIDDEN, WIDTH, FORM, GROUP, SHIFTED, BLOCK_K)
    total *= tl.load(weight_ptr + assignment, mask=real, other=0.0)[:, None]
    here = real[:, None] & inside[None, :]
    if ATOMIC:
        token = tl.load(token_ptr + position, mask=real, other=0).to(tl.int64)[:, None]
        tl.atomic_add(out_ptr + token * HIDDEN + output[None, :], total, mask=here, sem="relaxed")
    else:
        tl.store(out_ptr + row * HIDDEN + output[None, :], total, mask=here)

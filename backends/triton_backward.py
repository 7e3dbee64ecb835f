"""The layer of backend ``triton`` as a function that autograd follows: its input, its weights and its routing weights.

Shape letters: T tokens, K slots, N assignments, E experts, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.triton.backward import Assigned, gradients
from ..kernels.triton.combine import combine_slots, combine_sorted
from ..kernels.triton.dispatch import blocks_of_slots, blocks_of_sorted

if TYPE_CHECKING:
    from .triton import TritonExecutor


def differentiable(executor: TritonExecutor, x_TH: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return y_TH, new; ``inputs`` are those of the boundary, the routing weights last."""
    *where, weights = inputs
    arguments = (x_TH.contiguous(), *executor.leaves, weights, executor, *where)
    y_TH: Tensor = _Layer.apply(*arguments)  # type: ignore[no-untyped-call]
    return y_TH


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, executor: Any, *where: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TH, weights, *where)
        ctx.executor = executor
        y_TH = torch.empty_like(x_TH)
        executor.run(y_TH, x_TH, (*where, weights))
        return y_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weights, *where = ctx.saved_tensors
        executor = ctx.executor
        plan = executor.plan(x_TH, weights.numel())
        experts = executor.experts
        if len(where) == 2:
            blocks = blocks_of_sorted(where[0], where[1], plan.gate_up)
            token_N, real_N = where[0], torch.ones_like(where[0], dtype=torch.bool)
        else:
            blocks = blocks_of_slots(where[0], experts.num_experts, plan.gate_up)
            slot_N = torch.arange(weights.numel(), device=x_TH.device)
            token_N = slot_N // max(1, where[0].shape[1])
            real_N = ((where[0] >= 0) & (where[0] < experts.num_experts)).flatten()
        assigned = Assigned(token_N, weights.float().flatten(), real_N)
        grad_TH = grads[0].contiguous()
        made = gradients(x_TH, grad_TH, experts, assigned, blocks, plan.down, executor.hidden.activated)
        grad_x_TH = torch.empty_like(x_TH)
        if len(where) == 2:
            combine_sorted(made.rows_NH[:, None], token_N, grad_x_TH)
        else:
            combine_slots(made.rows_NH[:, None], where[0], experts.num_experts, grad_x_TH)
        grad_weights = made.weight_N.reshape(weights.shape).to(weights.dtype)
        return (grad_x_TH, made.gate_up, made.down, grad_weights, None, *(None for _ in where))

"""One boundary into another: what is converted inside the timed call when a backend takes another than the case's.

All results follow autograd in the weights. Shapes: T tokens, K slots, E experts, N assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..contracts import LayerSpec, MoebenchError

if TYPE_CHECKING:
    from torch import Tensor

TopK = tuple["Tensor", "Tensor"]
Sorted = tuple["Tensor", "Tensor", "Tensor"]


def topk_to_sorted(indices_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Sorted:
    """Return (token_N, offsets_E1 int32, weight_N) of slots; those that hold index E are left out."""
    import torch

    flat_S = indices_TK.reshape(-1)
    counts_E1 = torch.bincount(flat_S, minlength=num_experts + 1)
    offsets_E1 = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat_S.device)
    offsets_E1[1:] = counts_E1[:num_experts].cumsum(0)
    order_N = flat_S.argsort(stable=True)[: int(offsets_E1[-1])]
    token_N = torch.div(order_N, max(indices_TK.shape[1], 1), rounding_mode="floor")
    return token_N, offsets_E1, weights_TK.reshape(-1)[order_N]


def sorted_to_topk(token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor, num_tokens: int) -> TopK:
    """Return (indices_TK, weights_TK), padded with index E and weight 0, as wide as the busiest token needs."""
    from ..moe.routing import Routing

    num_experts = len(offsets_E1) - 1
    return Routing(token_N, expert_of(offsets_E1), weight_N, (num_tokens, num_experts)).padded()


def expert_of(offsets_E1: Tensor) -> Tensor:
    """Return expert_N, the expert of each assignment sorted by expert."""
    import torch

    counts_E = offsets_E1.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts_E), device=offsets_E1.device), counts_E)


def logits_to_topk(inputs: Sequence[Any], spec: LayerSpec) -> TopK:
    """Select from (logits_TE,) or (logits_TE, bias_E) as ``spec.selection`` says."""
    from ..moe.router import select

    if spec.selection is None:
        raise MoebenchError("boundary logits needs a selection in the layer's specification; use boundary=topk.")
    if spec.selection.bias and len(inputs) < 2:
        raise MoebenchError("this selection adds a bias; pass (logits_TE, bias_E) to the executor.")
    return select(inputs[0], spec.selection, bias_E=inputs[1] if len(inputs) > 1 else None)


def to_topk(inputs: Sequence[Any], spec: LayerSpec, num_tokens: int) -> TopK:
    """Return the boundary inputs of the case as (indices_TK, weights_TK)."""
    if spec.boundary == "sorted":
        token_N, offsets_E1, weight_N = inputs
        return sorted_to_topk(token_N, offsets_E1, weight_N, num_tokens)
    if spec.boundary == "logits":
        return logits_to_topk(inputs, spec)
    indices_TK, weights_TK = inputs
    return indices_TK, weights_TK


def to_sorted(inputs: Sequence[Any], spec: LayerSpec, num_tokens: int) -> Sorted:
    """Return the boundary inputs of the case as (token_N, offsets_E1, weight_N)."""
    if spec.boundary == "sorted":
        token_N, offsets_E1, weight_N = inputs
        return token_N, offsets_E1, weight_N
    return topk_to_sorted(*to_topk(inputs, spec, num_tokens), spec.experts)

"""How near to a decision a layer's numbers come: what rounding in a dtype may move, for the oracle's slack.

Shape letters: N assignments, H hidden, F expert width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .experts import ACTIVATIONS, ExpertStore


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding a number to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Return what ``down`` reads of what gate and up (or the one matrix) made, [N, F]."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return act(gate) * up


def cancellation(store: ExpertStore, gate_up: Tensor, x_NH: Tensor, before: Tensor, hidden_N1: Tensor) -> Tensor:
    """Return the squared error [N] that float32 may put into the one hidden unit of a rank-1 expert.

    A dot product errs by about 2^-24 * sqrt(H) of the norm of its products, whatever is left of them. Among the many
    units of a wide expert those that cancel do not count; the output of a rank-1 expert is nothing but its unit.
    """
    products_N = torch.stack([(x_NH.double() * row_H).norm(dim=1) for row_H in gate_up], dim=1)
    unit = torch.finfo(torch.float64 if x_NH.dtype == torch.float64 else torch.float32).eps / 2
    moved_N = torch.zeros_like(hidden_N1[:, 0])
    for column in range(before.shape[1]):
        shifted = before.clone()
        shifted[:, column] += unit * math.sqrt(store.hidden) * products_N[:, column]
        moved_N += (activate(shifted, store.activation, store.gated) - hidden_N1).square()[:, 0]
    return moved_N


def near_threshold(store: ExpertStore, before: Tensor, hidden_NF: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which hidden activations lie so near their threshold that rounding in ``dtype`` decides about them.

    A score carries the rounding of its threshold, at most u, and four or five more (gate, up, activation, product,
    weight) of which each is about 0.4 u: 4 u covers three of their standard deviations. The rounding of the gate goes
    through the activation, whose relative slope is far above 1 in its negative tail; it is measured there. In
    proportion to a typical score come the float32 error of the dot products and, where weights are dequantized, that of
    rounding them. ``before`` is what the activation reads, [N, 2F] or [N, F].
    """
    sparsity = store.sparsity
    if sparsity is None:
        return torch.zeros_like(hidden_NF, dtype=torch.bool)
    threshold = sparsity.thresholds["hidden"]
    score_NF = hidden_NF.abs()
    if "hidden" in sparsity.weights:
        score_NF = score_NF * sparsity.weights["hidden"].double()
    typical_N1 = score_NF.square().mean(dim=1, keepdim=True).sqrt()
    u, moved_NF = unit_roundoff(dtype), _moved(store, before, hidden_NF, dtype)
    if "hidden" in sparsity.weights:
        moved_NF = moved_NF * sparsity.weights["hidden"].double()
    return (score_NF - threshold).abs() <= 4 * u * threshold + moved_NF + _dot_error(store, dtype) * typical_N1


def _moved(store: ExpertStore, before: Tensor, hidden_NF: Tensor, dtype: torch.dtype) -> Tensor:
    """Return by how much the rounding of the gate to ``dtype`` may move each hidden activation [N, F]."""
    shifted = before.clone()
    shifted[:, : hidden_NF.shape[1]] *= 1 + 2 * unit_roundoff(dtype)  # the gate, or all there is
    return (activate(shifted, store.activation, store.gated) - activate(before, store.activation, store.gated)).abs()


def _dot_error(store: ExpertStore, dtype: torch.dtype) -> float:
    """Return the error of a hidden activation by its dot product, and by dequantized weights, of a typical one."""
    return 2.0**-23 * math.sqrt(store.hidden) + (unit_roundoff(dtype) if store.quantized else 0.0)


def hidden_error(store: ExpertStore, before: Tensor, hidden_NF: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what rounding in ``dtype`` may move each hidden activation by [N, F]; see ``near_threshold`` for why."""
    typical_N1 = hidden_NF.square().mean(dim=1, keepdim=True).sqrt()
    rounding_NF = 4 * unit_roundoff(dtype) * hidden_NF.abs() + _moved(store, before, hidden_NF, dtype)
    return rounding_NF + _dot_error(store, dtype) * typical_N1

"""The oracle of a backward pass: gradients of one layer in float64, and how far others may lie from them.

Shape letters: T tokens, H hidden, N assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..contracts import Check, MoebenchError
from .experts import ExpertStore
from .oracle import TINY_ROW, bound, entries, mismatch
from .oracle_near import activate
from .routing import Routing


@dataclass(frozen=True)
class Gradients:
    """Gradients of one layer for one output gradient: of the input [T, H] and of the experts' dense weights."""

    x_TH: Tensor
    gate_up: Tensor
    down: Tensor


def reference_gradients(store: ExpertStore, routing: Routing, x_TH: Tensor, grad_TH: Tensor) -> Gradients:
    """Return the float64 gradients of sum(y * grad_TH) for ``x_TH`` and the dense experts of ``store``."""
    if not isinstance(store.gate_up, Tensor) or not isinstance(store.down, Tensor) or store.sparsity is not None:
        raise MoebenchError("gradients are checked for dense experts without sparsity; drop both from the case.")
    dtype = x_TH.dtype
    leaves = [t.detach().to(dtype).double().requires_grad_() for t in (x_TH, store.gate_up, store.down)]
    x, experts = leaves[0], list(zip(leaves[1].unbind(), leaves[2].unbind(), strict=True))
    y_TH = torch.zeros_like(x)
    for expert, mine_N in entries(routing):
        token_N, kind = routing.token_N[mine_N], store.kinds[expert]
        if kind in ("ffn", "gather"):
            gate_up, down = experts[store.slots[expert]]
            hidden = activate(nnf.linear(x[token_N], gate_up), store.activation, store.gated)
            term_NH = nnf.linear(hidden, down)
        elif kind in ("zero", "copy"):
            term_NH = x[token_N] * float(kind == "copy")
        else:
            raise MoebenchError(f"gradients are not checked through '{kind}' experts; leave them out of the case.")
        y_TH = y_TH.index_add(0, token_N, routing.weight_N[mine_N].detach().double()[:, None] * term_NH)
    grads = torch.autograd.grad((y_TH * grad_TH.double()).sum(), leaves, allow_unused=True)
    return Gradients(*(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)))


def compare_gradients(actual: Gradients, ref: Gradients, dtype: torch.dtype) -> Check:
    """Judge gradients, of each token of x and each matrix of an expert: within 4 bound(dtype) of the reference's norm.

    A backward pass rounds about twice as often as a forward pass and sums over tokens besides; hence the factor.
    """
    worst, allowed = 0.0, 4 * bound(dtype)
    for name in ("x_TH", "gate_up", "down"):
        mine, expected = getattr(actual, name), getattr(ref, name)
        reason = mismatch(mine, expected, dtype)
        if reason:
            return Check(False, bound=allowed, reason=f"gradient of {name}: {reason}")
        if mine.numel() == 0:
            continue
        parts = len(expected)
        norm_P = expected.reshape(parts, -1).norm(dim=1)
        error_P = (mine.double() - expected).reshape(parts, -1).norm(dim=1)
        scale_P = norm_P.clamp(min=TINY_ROW * max(float(norm_P.max()), 1e-300))
        worst = max(worst, float((error_P / scale_P).max()))
        if worst > allowed:
            return Check(False, worst, allowed, f"the gradient of {name} is off by {worst:.2g} of its norm")
    return Check(True, worst, allowed)

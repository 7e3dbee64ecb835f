"""What the oracle knows of sparsity: what is left out in float64, and which decisions another rounding may turn.

Shape letters: N rows, H hidden, F expert width, I channels of a site, O outputs of the matrix behind it, R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .channels import DENSE, SiteRule, Sparsity, chosen, low_rank
from .experts import ACTIVATIONS, ExpertStore


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding a number to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Return act(gate) * up [.., F] from a product [.., 2F], or act of a product [.., F] where ``gated`` is false."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return act(gate) * up


def low_rank_part(sparsity: Sparsity, site: str, out_NI: Tensor, slot: int) -> Tensor:
    """Return what the low-rank matrix of a site makes of the channels that were left out, in float64; 0 without one."""
    rule = sparsity.sites.get(site)
    if rule is None or rule.residual is None:
        return out_NI.new_zeros(())
    left_OR, right_RI = low_rank(rule.residual, slot, torch.float64)
    return nnf.linear(nnf.linear(out_NI, right_RI), left_OR)


def moved_columns(sparsity: Sparsity, down: Tensor, slot: int) -> Tensor:
    """Return by what each channel of ``hidden`` counts more in the output where it is used [F], as squared norms."""
    rule = sparsity.sites.get("hidden")
    if rule is not None and rule.residual is not None:
        left_OR, right_RI = low_rank(rule.residual, slot, torch.float64)
        down = down - left_OR @ right_RI
    return down.square().sum(0)


def turned_together(sparsity: Sparsity) -> float:
    """Return by how much the square of what turned decisions move may exceed the sum of their squares: 2 for a top-k.

    Its decisions turn in pairs, one channel in for one out, and what both move may point the same way.
    """
    return (
        2.0 if any(sparsity.sites[site].k is not None for site in ("gate", "hidden") if site in sparsity.sites) else 1.0
    )


def hidden_activations(store: ExpertStore, before: Tensor, slot: int) -> tuple[Tensor, Tensor]:
    """Return what ``down`` reads where nothing is left out, and what comes to site ``hidden``: [N, F] both."""
    whole_NF = activate(before, store.activation, store.gated)
    if not store.gated:
        return whole_NF, whole_NF
    gate, up = before.chunk(2, dim=-1)
    return whole_NF, (store.sparsity or DENSE).apply("gate", ACTIVATIONS[store.activation](gate), slot) * up


def near_decisions(store: ExpertStore, before: Tensor, slot: int, dtype: torch.dtype) -> Tensor:
    """Return how many decisions about each channel, at ``gate`` and ``hidden``, rounding in ``dtype`` may turn [N, F].

    ``before`` is what the activation reads, [N, 2F] or [N, F].
    """
    found_NF = before.new_zeros(len(before), store.width, dtype=torch.int64)
    for site in ("gate", "hidden"):
        if site in (store.sparsity or DENSE).sites:
            found_NF += near_boundary(store, site, before, slot, dtype)
    return found_NF


def near_boundary(store: ExpertStore, site: str, before: Tensor, slot: int, dtype: torch.dtype) -> Tensor:
    """Return which activations at ``gate`` or ``hidden`` lie so near their threshold that rounding decides [N, F].

    A score carries the rounding of its threshold, at most u, and four or five more (gate, up, activation, product,
    weight) of which each is about 0.4 u: 4 u covers three of their standard deviations. The rounding of the gate goes
    through the activation, whose relative slope is far above 1 in its negative tail; it is measured there. In
    proportion to a typical score come the float32 error of the dot products and, where weights are dequantized, that of
    rounding them. The threshold of a top-k is the middle between the last score that is in and the first that is out;
    both may move, so that twice as much is near. ``before`` is what the activation reads, [N, 2F] or [N, F].
    """
    rule = (store.sparsity or DENSE).sites[site]
    act = _whole(store, site, before) if site == "gate" else hidden_activations(store, before, slot)[1]
    if rule.kept is not None:
        return torch.zeros_like(act, dtype=torch.bool)
    score_NF, moved_NF = rule.score(act, slot), moved(store, site, before, dtype)
    if rule.weight is not None:
        moved_NF = moved_NF * chosen(rule.weight, slot).double()
    threshold = _boundary(rule, score_NF)
    typical_N1 = score_NF.square().mean(dim=1, keepdim=True).sqrt()
    tolerance_NF = 4 * unit_roundoff(dtype) * threshold + moved_NF + dot_error(store, dtype) * typical_N1
    return (score_NF - threshold).abs() <= tolerance_NF * (1 if rule.k is None else 2)


def _boundary(rule: SiteRule, score_NF: Tensor) -> Tensor:
    """Return the score that divides channels in from channels out: one, or one for each row [N, 1]."""
    if rule.threshold is not None:
        return score_NF.new_tensor(rule.threshold)
    ranked_NF, last = nnf.pad(score_NF.sort(dim=1, descending=True).values, (1, 1)), rule.k or 0
    return ranked_NF[:, last : last + 2].mean(dim=1, keepdim=True)


def moved(store: ExpertStore, site: str, before: Tensor, dtype: torch.dtype) -> Tensor:
    """Return by how much the rounding of the gate to ``dtype`` may move each activation [N, F] of a site."""
    shifted = before.clone()
    shifted[:, : store.width] *= 1 + 2 * unit_roundoff(dtype)  # the gate, or all there is
    return (_whole(store, site, shifted) - _whole(store, site, before)).abs()


def _whole(store: ExpertStore, site: str, before: Tensor) -> Tensor:
    """Return what would come to ``gate`` or ``hidden`` [N, F] if no channel were left out before it."""
    if site == "gate":
        return ACTIVATIONS[store.activation](before.chunk(2, dim=-1)[0])
    return activate(before, store.activation, store.gated)


def dot_error(store: ExpertStore, dtype: torch.dtype) -> float:
    """Return the error of a hidden activation by its dot product, and by dequantized weights, of a typical one."""
    return 2.0**-23 * math.sqrt(store.hidden) + (unit_roundoff(dtype) if store.quantized else 0.0)


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


def hidden_error(store: ExpertStore, before: Tensor, hidden_NF: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what rounding in ``dtype`` may move each hidden activation by [N, F]; see ``near_boundary`` for why."""
    typical_N1 = hidden_NF.square().mean(dim=1, keepdim=True).sqrt()
    rounding_NF = 4 * unit_roundoff(dtype) * hidden_NF.abs() + moved(store, "hidden", before, dtype)
    return rounding_NF + dot_error(store, dtype) * typical_N1

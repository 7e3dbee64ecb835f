"""What sparsity would save if all that is left out were skipped: operations and weight bytes of one assignment.

Shape letters: T tokens, H hidden, F expert width, R rank, N rows, I channels of a site, O outputs behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import SITES, Metric
from ..channels import DENSE, Sparsity
from ..experts import ExpertStore
from ..routing import Routing
from ..sparsity import at_site, density, ffn_inputs
from .channel import matrix_shape


@dataclass(frozen=True)
class SparsityCost:
    """The least work of an FFN expert for one token: dense, and with all that is left out skipped.

    ``flops`` are 2 per weight that is used, ``bytes`` those of these weights as stored. What deciding costs (one
    comparison and at most one product per channel), a rotation and the storage of masks are not counted.
    """

    dense_flops: float
    kept_flops: float
    dense_bytes: float
    kept_bytes: float


def theoretical_cost(store: ExpertStore, routing: Routing, x_TH: Tensor) -> SparsityCost | None:
    """Return the mean cost over the FFN assignments of ``routing``; None without any.

    A weight of gate is used where its input channel is, one of up where besides the gate keeps its row, and one of down
    where gate and hidden both keep its column. A weight that is masked is never used. A low-rank residual costs its own
    R (I + O) weights, at the bytes of an expert's.
    """
    weights = store.hidden * store.width * (3 if store.gated else 2)
    used, assignments = 0.0, 0
    for x_NH, slot in ffn_inputs(store, routing, x_TH):
        used += used_weights(store, slot, x_NH)
        assignments += len(x_NH)
    if not assignments:
        return None
    element = store.nbytes / (weights * len(store.ffn_ids))
    mean = used / assignments
    return SparsityCost(2.0 * weights, 2.0 * mean, element * weights, element * mean)


def used_weights(store: ExpertStore, slot: int, x_NH: Tensor) -> float:
    """Return how many weights of one expert its tokens ``x_NH`` use, summed over the tokens."""
    sparsity = store.sparsity or DENSE
    if sparsity.weights is not None:
        kept = sparsity.weights.gate_up[slot].sum() + sparsity.weights.down[slot].sum()
        return float(kept) * len(x_NH)
    inputs_N, gate_NF, hidden_NF = (_kept(sparsity, store, slot, x_NH, site) for site in SITES)
    inputs_N, rows_N, columns_N = inputs_N.sum(1), gate_NF.sum(1), (gate_NF * hidden_NF).sum(1)
    up_N = inputs_N * rows_N if store.gated else torch.zeros_like(inputs_N)
    used_N = inputs_N * store.width + up_N + columns_N * store.hidden
    return float(used_N.sum()) + len(x_NH) * residual_weights(store)


def _kept(sparsity: Sparsity, store: ExpertStore, slot: int, x_NH: Tensor, site: str) -> Tensor:
    """Return 1 for each channel that is used and 0 for the others [N, I] float64; ones where a site has no rule."""
    rule = sparsity.sites.get(site)
    if rule is None:
        width = store.hidden if site == "input" else store.width
        return torch.ones(len(x_NH), width, dtype=torch.float64)
    return rule.mask(rule.turned(at_site(store, slot, x_NH, site)), slot).double()


def residual_weights(store: ExpertStore) -> int:
    """Return how many weights the low-rank residuals of one expert have: R (I + O) at each site with one."""
    total = 0
    for site, rule in (store.sparsity or DENSE).sites.items():
        if rule.residual is not None:
            total += rule.residual.left_FOR.shape[2] * sum(matrix_shape(store, site))
    return total


def sparsity_metrics(store: ExpertStore, routing: Routing, x_TH: Tensor) -> list[Metric]:
    """Return the densities of all sites, and the shares of flops and of weight bytes that are used in theory.

    ``kept_flops`` and ``kept_bytes`` are the same number where all weights have the same size; 1 without sparsity, None
    without an FFN assignment. No execution here need skip what they say.
    """
    cost = theoretical_cost(store, routing, x_TH)
    shares = (None, None) if cost is None else (cost.kept_flops / cost.dense_flops, cost.kept_bytes / cost.dense_bytes)
    named = zip(("kept_flops", "kept_bytes"), shares, strict=True)
    return [*density(store, routing, x_TH), *(Metric(name, share, "1") for name, share in named)]

"""Activation sparsity: which channels of an expert's inputs may be left out.

TEAL (arXiv 2408.14690) leaves out activations below a threshold, the empirical quantile of |activation| over
calibration tokens. Here a site is shared by the routed experts of a layer: ``input`` is what gate and up read (width
H), ``hidden`` is what down reads (width F). Each expert's own calibration inputs are counted, so that a token counts
once per FFN expert that it is sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..contracts import SITES, Metric
from .channels import DENSE, SiteRule, Sparsity
from .experts import ACTIVATIONS, ExpertStore, expert_product, hidden_from
from .layer import assignments
from .plugins import Teal
from .routing import Routing

SparsityStep = Callable[[ExpertStore, Routing, Tensor], ExpertStore]


def keep(params: Any) -> SparsityStep:
    """Sparsity ``none``: every activation is used."""
    return lambda store, routing, x_TH: store


def teal(params: Teal) -> SparsityStep:
    """Sparsity ``teal``: one magnitude threshold for each site of ``params.sites``.

    The threshold of ``hidden`` is calibrated with ``input`` already sparse, so that the level holds as executed. Level
    0 sets no sparsity at all: the store comes back as it is.
    """

    def calibrate(store: ExpertStore, routing: Routing, x_TH: Tensor) -> ExpertStore:
        rules: dict[str, SiteRule] = {}
        for site in SITES:
            if site in params.sites:
                so_far = replace(store, sparsity=Sparsity(rules))
                found = quantile([part for part, _ in site_activations(so_far, routing, x_TH, site)], params.level)
                rules = rules if found is None else {**rules, site: SiteRule(found)}
        return replace(store, sparsity=Sparsity(rules)) if rules else store

    return calibrate


def site_activations(store: ExpertStore, routing: Routing, x_TH: Tensor, site: str) -> Iterator[tuple[Tensor, int]]:
    """Yield the activations [n, width] at ``site``, before it leaves any out, and the slot of every FFN expert with
    tokens; what earlier sites leave out is left out."""
    x_TH = x_TH.float()
    for expert, token_N, _ in assignments(routing):
        if store.kinds[expert] not in ("ffn", "gather"):
            continue
        x_NH, slot = x_TH[token_N], store.slots[expert]
        if site == "input":
            yield x_NH, slot
            continue
        product = expert_product(x_NH, store.weights(slot)[0], store, slot)
        if site == "gate":
            yield ACTIVATIONS[store.activation](product.chunk(2, dim=-1)[0]), slot
        else:
            yield hidden_from(product, store, slot), slot


def quantile(activations: list[Tensor], level: float) -> float | None:
    """Return the least bfloat16 number with at least floor(level * n) of the n magnitudes at or below it.

    A bfloat16 threshold decides alike in every dtype that an execution may compare in. None where nothing is left out.
    """
    rank = int(level * sum(activation.numel() for activation in activations))
    if rank == 0:
        return None
    exact = torch.cat([activation.abs().flatten() for activation in activations]).kthvalue(rank).values
    rounded = exact.bfloat16()
    if rounded < exact:
        rounded = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return float(rounded)


def density(store: ExpertStore, routing: Routing, x_TH: Tensor) -> list[Metric]:
    """Return ``density_input``, ``density_gate`` and ``density_hidden``: the fraction of activations used at each site.

    ``n`` counts the activations of all FFN assignments; with none of them the value is None. Experts without a gate
    have no ``density_gate``.
    """
    return [_density(store, routing, x_TH, site) for site in SITES if store.gated or site != "gate"]


def _density(store: ExpertStore, routing: Routing, x_TH: Tensor, site: str) -> Metric:
    rule = (store.sparsity or DENSE).sites.get(site)
    used, total = 0, 0
    for activation, slot in site_activations(store, routing, x_TH, site):
        used += activation.numel() if rule is None else int(rule.mask(rule.turned(activation), slot).sum())
        total += activation.numel()
    return Metric(f"density_{site}", used / total if total else None, "1", n=total)

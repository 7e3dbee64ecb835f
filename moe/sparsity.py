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

from ..contracts import Metric
from .experts import ExpertStore, Sparsity
from .layer import assignments, ffn_hidden
from .plugins import Teal
from .routing import Routing

SparsityStep = Callable[[ExpertStore, Routing, Tensor], ExpertStore]

SITES = ("input", "hidden")


def keep(params: Any) -> SparsityStep:
    """Sparsity ``none``: every activation is used."""
    return lambda store, routing, x_TH: store


def teal(params: Teal) -> SparsityStep:
    """Sparsity ``teal``: one magnitude threshold for each site of ``params.sites``.

    The threshold of ``hidden`` is calibrated with ``input`` already sparse, so that the level holds as executed. Level
    0 sets no sparsity at all: the store comes back as it is.
    """

    def calibrate(store: ExpertStore, routing: Routing, x_TH: Tensor) -> ExpertStore:
        thresholds: dict[str, float] = {}
        for site in SITES:
            if site in params.sites:
                so_far = replace(store, sparsity=Sparsity(thresholds))
                found = quantile(list(site_activations(so_far, routing, x_TH, site)), params.level)
                thresholds = thresholds if found is None else {**thresholds, site: found}
        return replace(store, sparsity=Sparsity(thresholds)) if thresholds else store

    return calibrate


def site_activations(store: ExpertStore, routing: Routing, x_TH: Tensor, site: str) -> Iterator[Tensor]:
    """Yield the activations [n, width] at ``site`` of every FFN expert with tokens, before that site is sparsified."""
    x_TH = x_TH.float()
    sparsity = store.sparsity or Sparsity({})
    for expert, token_N, _ in assignments(routing):
        if store.kinds[expert] not in ("ffn", "gather"):
            continue
        x_NH = x_TH[token_N]
        if site == "input":
            yield x_NH
        else:
            gate_up, _ = store.weights(store.slots[expert])
            yield ffn_hidden(sparsity.apply("input", x_NH), gate_up, store.activation, store.gated)


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
    """Return ``density_input`` and ``density_hidden``: the fraction of activations used at each site.

    ``n`` counts the activations of all FFN assignments; with none of them the value is None.
    """
    return [_density(store, routing, x_TH, site) for site in SITES]


def _density(store: ExpertStore, routing: Routing, x_TH: Tensor, site: str) -> Metric:
    sparsity = store.sparsity or Sparsity({})
    used, total = 0, 0
    for activation in site_activations(store, routing, x_TH, site):
        kept = sparsity.apply(site, activation).count_nonzero() if site in sparsity.thresholds else activation.numel()
        used += int(kept)
        total += activation.numel()
    return Metric(f"density_{site}", used / total if total else None, "1", n=total)

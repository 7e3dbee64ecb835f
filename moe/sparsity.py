"""What comes to the sites of a layer's experts, thresholds from it, and how much of it is used.

A site (``contracts.SITES``) is shared by the routed experts of a layer. Each expert's own inputs are counted, so that a
token counts once per FFN expert that it is sent to. The methods are in ``moe.sparsifiers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..contracts import SITES, Metric
from .channels import DENSE
from .experts import ACTIVATIONS, ExpertStore, expert_product, hidden_from
from .layer import assignments
from .routing import Routing


def keep(params: Any) -> Callable[..., ExpertStore]:
    """Sparsity ``none``: every activation is used."""
    return lambda store, routing, x_TH, seed=0: store


def ffn_inputs(store: ExpertStore, routing: Routing, x_TH: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield (x_NH float32, slot) of every FFN expert with tokens: what it is sent, and its place in the store."""
    x_TH = x_TH.float()
    for expert, token_N, _ in assignments(routing):
        if store.kinds[expert] in ("ffn", "gather"):
            yield x_TH[token_N], store.slots[expert]


def site_activations(store: ExpertStore, routing: Routing, x_TH: Tensor, site: str) -> Iterator[tuple[Tensor, int]]:
    """Yield the activations [N, width] at ``site``, before it leaves any out, and the slot of every FFN expert with
    tokens; what earlier sites leave out is left out."""
    for x_NH, slot in ffn_inputs(store, routing, x_TH):
        yield at_site(store, slot, x_NH, site), slot


def at_site(store: ExpertStore, slot: int, x_NH: Tensor, site: str) -> Tensor:
    """Return what comes to a site of one expert from its tokens, [N, width]."""
    if site == "input":
        return x_NH
    product = expert_product(x_NH, store.weights(slot)[0], store, slot)
    if site == "gate":
        return ACTIVATIONS[store.activation](product.chunk(2, dim=-1)[0])
    return hidden_from(product, store, slot)


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

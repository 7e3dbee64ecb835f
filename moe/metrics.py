"""Figures of any Routing: how even the load is, how many experts a token has, and what the weights add up to.

Load is the number of entries per expert id. Shape letters: T tokens, E expert ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contracts import OWNERS, Metric, Series
from .routing import Routing


def routing_metrics(routing: Routing, kinds: Sequence[str] | None = None) -> list[Metric]:
    """Return the figures of one Routing; those of an empty one are None.

    With ``kinds`` (one per expert id) load is that of the experts that own weights alone, and ``ffn_k_mean`` says how
    many of them a token has: the others cost next to nothing, and a zero expert never has an entry.
    """
    load_E = routing.counts_E.double()
    metrics = []
    if kinds is not None:
        load_E = load_E[[kind in OWNERS for kind in kinds]]
        metrics.append(_per_token("ffn_k_mean", float(load_E.sum()), routing, "experts"))
    return [*load_metrics(load_E), *metrics, *_token_metrics(routing)]


def load_metrics(load_E: Tensor) -> list[Metric]:
    """Return the imbalance of a load per expert (any non-negative numbers), experts without load included.

    ``load_max_over_mean`` is 1 at balance and E where one expert has all; ``load_cv`` is the population standard
    deviation over the mean; ``load_gini`` lies in [0, 1 - 1/E]; ``load_entropy_normalised`` is entropy over ln E.
    """
    load_E = load_E.double()
    experts, total = len(load_E), float(load_E.sum())
    dead = Metric("dead_experts", float((load_E == 0).sum()), "experts", n=experts)
    if total == 0:
        names = ("load_max_over_mean", "load_cv", "load_gini", "load_entropy", "load_entropy_normalised")
        return [*(Metric(name, None, "nats" if name == "load_entropy" else "", n=0) for name in names), dead]
    observations = round(total)
    mean = total / experts
    rank_E = torch.arange(1, experts + 1, dtype=torch.float64, device=load_E.device)
    gini = float(((2 * rank_E - experts - 1) * load_E.sort().values).sum()) / (experts * total)
    entropy = float(torch.special.entr(load_E / total).sum())
    return [
        Metric("load_max_over_mean", float(load_E.max()) / mean, n=observations),
        Metric("load_cv", float(load_E.std(correction=0)) / mean, n=observations),
        Metric("load_gini", gini, n=observations),
        Metric("load_entropy", entropy, "nats", n=observations),
        Metric("load_entropy_normalised", entropy / math.log(experts) if experts > 1 else None, n=observations),
        dead,
    ]


def _token_metrics(routing: Routing) -> list[Metric]:
    """Return mean and population variance of k over all tokens, dropped ones included, and the mean sum of weights."""
    k_T = routing.k_T.double()
    tokens = routing.num_tokens
    return [
        _per_token("k_mean", float(k_T.sum()), routing, "experts"),
        Metric("k_var", float(k_T.var(correction=0)) if tokens else None, "experts^2", n=tokens),
        _per_token("weight_sum_mean", float(routing.weight_N.detach().double().sum()), routing, ""),
    ]


def _per_token(name: str, total: float, routing: Routing, unit: str) -> Metric:
    tokens = routing.num_tokens
    return Metric(name, total / tokens if tokens else None, unit, n=tokens)


def load_series(routing: Routing, layer: int | None = None) -> Series:
    """Return ``tokens_per_expert``: the load of every expert id."""
    return Series("tokens_per_expert", tuple(map(float, routing.counts_E.tolist())), "tokens", layer)


def histogram(requested_E: Tensor, routing: Routing, layer: int | None = None) -> tuple[tuple[Series, Series], Metric]:
    """Return requested and realised shares of the load, each summing to one, and their largest absolute difference.

    ``requested_E`` is any non-negative weight per expert, in proportion to which traffic was asked for.
    """
    requested_E = requested_E.double().cpu()
    load_E = routing.counts_E.double().cpu()
    if len(requested_E) != len(load_E) or float(requested_E.sum()) <= 0:
        raise ValueError(f"the requested histogram must have {len(load_E)} shares, at least one of them positive.")
    shares_E = requested_E / requested_E.sum()
    realised_E = load_E / load_E.sum().clamp(min=1)
    series = (
        Series("requested_share", tuple(shares_E.tolist()), "share", layer),
        Series("realised_share", tuple(realised_E.tolist()), "share", layer),
    )
    entries = len(routing.expert_N)
    error = float((shares_E - realised_E).abs().max()) if entries else None
    return series, Metric("traffic_share_error", error, "share", n=entries)

"""Experts taken out of a running layer: their outputs are zero and the router does not know (arXiv 2507.23279).

A missing entry of G is an output of zero, so nothing is done to weights, and what is left keeps its weight.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .router import Router, RouterBundle
from .routing import Context, Routing


def dropped(routing: Routing, experts: Collection[int]) -> Routing:
    """Return the Routing without the entries of ``experts``; the other weights stay as they are."""
    gone = torch.tensor(sorted(experts), dtype=torch.int64, device=routing.expert_N.device)
    return routing.keep(~torch.isin(routing.expert_N, gone))


def of_layer(experts: Sequence[str], layer: int) -> frozenset[int]:
    """Return the ids that a list of ``layer:expert`` has for one decoder layer."""
    pairs = (one.split(":") for one in experts)
    return frozenset(int(expert) for place, expert in pairs if int(place) == layer)


class Dropping(Router):
    """A router without the outputs of the listed experts (``layer:expert``); everything else is the router's own."""

    def __init__(self, router: Router, experts: Sequence[str]) -> None:
        super().__init__()
        self.router, self.experts = router, tuple(experts)
        self.needs, self.causal, self.scope = router.needs, router.causal, router.scope

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the router's Routing without the entries of the layer's listed experts."""
        return dropped(self.router(x_TH, ctx), of_layer(self.experts, ctx.layer))

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Hand everything on to the router."""
        self.router.update(routing, signal)


def with_dropping(bundle: RouterBundle, experts: Sequence[str]) -> RouterBundle:
    """Return the bundle with the outputs of ``experts`` dropped."""
    return replace(bundle, router=Dropping(bundle.router, experts))

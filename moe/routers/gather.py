"""Routers over very many rank-1 experts: product keys (PEER, arXiv 2407.04153) and Tucker keys (UltraMem, 2411.12364).

The searches are those of ``moe.gather``. Shape letters: T tokens, H hidden, E expert ids, L found rows of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..gather.peer import ProductKeyRouter
from ..gather.rank_one import merged_routing
from ..gather.ultramem import TuckerSearch, seeded_shuffle
from ..router import Router, RouterBundle
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.gather import PEER, UltraMem
    from ..shapes import ModelShape

Factory = Callable[["LayerWeights", "ModelShape", int], RouterBundle]


class TuckerRouter(Router):
    """The rows that a search with one core finds, shuffled, modulo the number of experts, weighted by their scores."""

    shuffle_E: Tensor

    def __init__(self, search: TuckerSearch, shuffle_E: Tensor, experts: int) -> None:
        super().__init__()
        if len(search.core_MARR) != 1:
            raise ValueError(f"{len(search.core_MARR)} cores give a row as many weights; route with one core.")
        self.search = search
        self.register_buffer("shuffle_E", shuffle_E)
        self.experts = experts

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        found = self.search(x_TH)
        rows_TL = self.shuffle_E[found.rows_TAK].flatten(1) % self.experts
        return merged_routing(rows_TL, found.scores_TAKM.flatten(1), self.experts, ctx.valid_T)

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Search along the leading vectors of the core as it is now."""
        self.search.refresh()


def peer(params: PEER) -> Factory:
    """Return the factory of PEER's router."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds, side = params.kinds(shape), params.side(shape)
        router = ProductKeyRouter.seeded(
            shape.hidden, side, params.heads, params.k, params.key_width, seed, params.score, shape.experts
        )
        return RouterBundle(router, kinds)

    return factory


def ultramem(params: UltraMem) -> Factory:
    """Return the factory of UltraMem's router with one core."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds, side = params.kinds(shape), params.side(shape)
        search = TuckerSearch.seeded(
            shape.hidden, side, params.key_width, params.k, params.heads, params.rank, cores=1, seed=seed
        )
        return RouterBundle(TuckerRouter(search, seeded_shuffle(side, seed), shape.experts), kinds)

    return factory

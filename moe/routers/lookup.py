"""Routers that learn nothing: Hash layers (arXiv 2106.04426) and THOR (arXiv 2110.04260).

Shape letters: T tokens, E expert ids, V token ids of the vocabulary, D draws.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..router import Router, RouterBundle
from ..router_context import ids_per_token, needed, number_segments
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.lookup import Hash, Thor
    from ..shapes import ModelShape


class Lookup(Router):
    """The expert of a token is ``table_V[token id]``, with weight 1. There are no logits."""

    needs = frozenset({"token_ids_T"})
    table_V: Tensor

    def __init__(self, table_V: Tensor, experts: int) -> None:
        super().__init__()
        self.register_buffer("table_V", table_V)
        self.experts = experts

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing; only the number of tokens is read from ``x_TH``."""
        ids_T = ids_per_token(ctx, "token_ids_T", len(x_TH), len(self.table_V))
        return _one_each(self.table_V[ids_T.to(self.table_V.device)], x_TH, ctx, self.experts)


class Chance(Router):
    """A uniformly random expert with weight 1: in training one for the batch, else one per token or ``segment``."""

    def __init__(self, experts: int, per_segment: bool) -> None:
        super().__init__()
        self.experts = experts
        self.per_segment = per_segment
        self.needs = frozenset({"rng", "segment_T"} if per_segment else {"rng"})

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing; only the number of tokens is read from ``x_TH``."""
        rng: torch.Generator = needed(ctx, "rng")
        draw_T, draws = self._draws(x_TH, ctx)
        expert_D = torch.randint(self.experts, (draws,), generator=rng, device=rng.device).to(x_TH.device)
        return _one_each(expert_D[draw_T], x_TH, ctx, self.experts)

    def _draws(self, x_TH: Tensor, ctx: Context) -> tuple[Tensor, int]:
        """Return (which draw each token takes, how many draws there are)."""
        tokens = len(x_TH)
        if ctx.training:
            return torch.zeros(tokens, dtype=torch.int64, device=x_TH.device), 1
        if self.per_segment:
            return number_segments(ctx, tokens)
        return torch.arange(tokens, device=x_TH.device), tokens


def _one_each(expert_T: Tensor, x_TH: Tensor, ctx: Context, experts: int) -> Routing:
    if ctx.valid_T is not None:
        expert_T = expert_T.masked_fill(~ctx.valid_T, experts)
    return Routing.topk(expert_T[:, None], torch.ones(len(x_TH), 1, device=x_TH.device), experts)


def random_table(vocabulary: int, experts: int, seed: int) -> Tensor:
    """Return table_V int64 of independent uniform experts."""
    return torch.randint(experts, (vocabulary,), generator=torch.Generator().manual_seed(seed))


def balanced_table(frequency_V: Tensor, experts: int) -> Tensor:
    """Return table_V int64: ids by falling frequency, each to the expert whose frequencies add up to least so far."""
    order_V = torch.argsort(frequency_V, descending=True, stable=True)
    load = [(0.0, expert) for expert in range(experts)]
    chosen = []
    for frequency in frequency_V[order_V].tolist():
        least, expert = load[0]
        heapq.heapreplace(load, (least + frequency, expert))
        chosen.append(expert)
    table_V = torch.empty(len(frequency_V), dtype=torch.int64)
    table_V[order_V] = torch.tensor(chosen)
    return table_V


def build_hash(params: Hash) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of a Hash layer; a balanced table does not depend on the seed."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        if params.table == "random":
            table_V = random_table(params.vocabulary, shape.experts, seed)
        else:
            rank_V = torch.arange(1, params.vocabulary + 1, dtype=torch.float64)
            table_V = balanced_table(rank_V**-params.exponent, shape.experts)
        return RouterBundle(Lookup(table_V, shape.experts), params.kinds(shape))

    return factory


def build_thor(params: Thor) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of THOR; chance comes from ``ctx.rng`` alone."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        return RouterBundle(Chance(shape.experts, params.draw == "segment"), params.kinds(shape))

    return factory

"""What several token routers share: routings from masks, two kinds of random numbers, and learned permutations.

Shape letters: T tokens, H hidden, E expert ids, N assignments, J parts of a gate that are permuted on their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .router import Router, seeded_normal
from .routing import Context, Routing
from .schedules import Schedule


def masked_routing(
    gate_TE: Tensor, keep_TE: Tensor, ctx: Context, logits_TE: Tensor | None = None, probs_TE: Tensor | None = None
) -> Routing:
    """Return the entries of ``gate_TE`` where ``keep_TE`` (bool) is true and the token is valid."""
    if ctx.valid_T is not None:
        keep_TE = keep_TE & ctx.valid_T[:, None]
    token_N, expert_N = keep_TE.nonzero(as_tuple=True)
    shape = (gate_TE.shape[0], gate_TE.shape[1])
    return Routing(token_N, expert_N, gate_TE[token_N, expert_N], shape, logits_TE, probs_TE)


def seeded_uniform(size: Sequence[int], bound: float, seed: int, stream: str) -> Tensor:
    """Return float32 U(-bound, bound) numbers that depend on ``seed`` and the name of the stream alone."""
    return bound * torch.erf(seeded_normal(size, math.sqrt(0.5), seed, stream))


def gumbel_noise(like: Tensor, rng: torch.Generator) -> Tensor:
    """Return Gumbel(0, 1) noise, float32, in the shape and on the device of ``like``."""
    exponential = torch.empty(like.shape, device=rng.device).exponential_(generator=rng)
    return -exponential.log().to(like.device)


class Jitter(nn.Module):
    """z = scorer(x u) in training, u ~ U(1 - ``width``, 1 + ``width``) of its own for each number of x (Switch)."""

    def __init__(self, scorer: nn.Module, width: float) -> None:
        super().__init__()
        self.scorer = scorer
        self.width = width

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        if ctx.training:
            if ctx.rng is None:
                raise ValueError("a jittered router cannot decide without the Context's 'rng' in training; give it.")
            x_TH = x_TH.float()
            noise_TH = torch.rand(x_TH.shape, generator=ctx.rng, device=ctx.rng.device).to(x_TH.device)
            x_TH = x_TH * (1 + self.width * (2 * noise_TH - 1))
        logits_TE: Tensor = self.scorer(x_TH, ctx)
        return logits_TE


# --- permutations ----------------------------------------------------------------------------------------------------


def sinkhorn(logits_JEE: Tensor, iterations: int) -> Tensor:
    """Return exp(logits) with columns and rows made to sum to one in turn, rows last; computed in logarithms.

    As the scale of the logits grows it tends to the permutation with the largest sum of logits.
    """
    for _ in range(iterations):
        logits_JEE = logits_JEE - logits_JEE.logsumexp(-2, keepdim=True)
        logits_JEE = logits_JEE - logits_JEE.logsumexp(-1, keepdim=True)
    return logits_JEE.exp()


def best_assignment(value_EE: Tensor) -> Tensor:
    """Return column_E int64, the permutation with the largest sum of value[e, column[e]] (the Hungarian method)."""
    if not bool(torch.isfinite(value_EE).all()):
        raise ValueError("an assignment needs finite values; train the permutation with a smaller learning rate.")
    cost = -value_EE.detach().double().cpu().numpy()
    size = len(cost)
    # Column `size` is a stand-in: the row to be placed begins there, and a path of swaps leads to a free column.
    row_of = np.full(size + 1, -1)
    row_price, column_price = np.zeros(size), np.zeros(size + 1)
    for row in range(size):
        row_of[size] = row
        came_from = _cheapest_path(cost, row_of, row_price, column_price)
        column = int(came_from[size])
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    return torch.from_numpy(np.argsort(row_of[:size])).to(value_EE.device)


def _cheapest_path(cost: np.ndarray, row_of: np.ndarray, row_price: np.ndarray, column_price: np.ndarray) -> np.ndarray:
    """Return, per column, the column before it on the cheapest path from the stand-in; its own entry is the free end.

    Prices are changed in place so that no reduced cost is negative and those of placed pairs are zero.
    """
    size = len(cost)
    came_from = np.full(size + 1, size)
    shortest, done = np.full(size, np.inf), np.zeros(size + 1, dtype=bool)
    column = size
    while row_of[column] >= 0:
        done[column] = True
        row = row_of[column]
        reduced = cost[row] - row_price[row] - column_price[:size]
        better = ~done[:size] & (reduced < shortest)
        shortest[better] = reduced[better]
        came_from[:size][better] = column
        column = int(np.where(done[:size], np.inf, shortest).argmin())
        step = shortest[column]
        row_price[row_of[done]] += step
        column_price[done] -= step
        shortest[~done[:size]] -= step
    came_from[size] = column
    return came_from


class Permutation(nn.Module):
    """J learned permutations of experts, as the local search of COMET (arXiv 2306.02824) finds them.

    In training at a progress below ``until`` they are soft: ``sinkhorn`` of logits / tau, with tau from 1e-3 to 1e-7
    and 20 to 150 iterations. Otherwise they are the permutations that this tends to, which ``round`` takes from the
    logits after each training step. (The released code rounds its last soft matrix instead, adds noise times 0, and
    normalises columns last, so that weights must be renormalised.)
    """

    order_JE: Tensor

    def __init__(self, logits_JEE: Tensor, until: float) -> None:
        super().__init__()
        self.logits_JEE = nn.Parameter(logits_JEE.detach().float().clone())
        self.register_buffer("order_JE", torch.zeros(logits_JEE.shape[:2], dtype=torch.int64))
        self.tau = Schedule(1e-3, 1e-7, "exponential", until)
        self.iterations = Schedule(20, 150, "linear", until)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Set ``order_JE``: what expert e of part j is called."""
        self.order_JE.copy_(torch.stack([best_assignment(logits_EE) for logits_EE in self.logits_JEE]))

    def searching(self, ctx: Context) -> bool:
        """Whether the permutations are soft."""
        return ctx.training and ctx.progress < self.tau.until

    def soft(self, progress: float) -> Tensor:
        """Return the soft permutations [J, E, E] at ``progress``; rows sum to one, columns nearly so."""
        return sinkhorn(self.logits_JEE / self.tau.at(progress), round(self.iterations.at(progress)))

    def forward(self, gate_TJE: Tensor, ctx: Context) -> Tensor:
        """Return gate_TE, the sum over the parts of G_j Pi_j; with one permutation for all parts they are added first.

        Every row keeps its sum.
        """
        if len(self.order_JE) == 1:
            gate_TJE = gate_TJE.sum(1, keepdim=True)
        if self.searching(ctx):
            return torch.einsum("tje,jef->tf", gate_TJE, self.soft(ctx.progress))
        names_TN = self.order_JE.flatten().expand(len(gate_TJE), -1)
        return torch.zeros_like(gate_TJE[:, 0]).scatter_add(1, names_TN, gate_TJE.flatten(1))


def permutation_entropy(soft_JEE: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return the entropies of all rows and all columns, added up, as a mean over the J; 0 for hard permutations.

    COMET adds it with coefficient 1e-4 while it searches.
    """
    column_JEE = soft_JEE / soft_JEE.sum(-2, keepdim=True).clamp(min=epsilon)
    both = torch.stack([soft_JEE, column_JEE])
    return -(both * (both + epsilon).log()).sum() / len(soft_JEE)


class Permuted(Router):
    """Any router with its experts renamed by one learned permutation: G' = G Pi.

    While it is soft every token of the router has all experts; afterwards it has as many as the router gives it.
    """

    def __init__(self, router: Router, permutation: Permutation) -> None:
        super().__init__()
        self.router = router
        self.permutation = permutation
        self.needs = router.needs | {"progress"}
        self.causal = router.causal
        self.scope = router.scope

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the router's Routing with renamed experts; logits have no mixture and are left out of a soft one."""
        routing: Routing = self.router(x_TH, ctx)
        probs_TE = None if routing.probs_TE is None else self.permutation(routing.probs_TE[:, None], ctx)
        if self.permutation.searching(ctx):
            return Routing.dense(self.permutation(routing.to_dense()[:, None], ctx), None, probs_TE)
        order_E = self.permutation.order_JE[0]
        logits_TE = None if routing.logits_TE is None else routing.logits_TE[:, order_E.argsort()]
        return replace(routing, expert_N=order_E[routing.expert_N], logits_TE=logits_TE, probs_TE=probs_TE)

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Update the router, and round the permutation."""
        self.router.update(routing, signal)
        self.permutation.round()

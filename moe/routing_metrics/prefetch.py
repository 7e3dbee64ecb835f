"""How well a layer's experts are known a layer earlier, so that their weights could be fetched ahead.

Shape letters: T tokens, E expert ids, B experts fetched per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...contracts import Metric
from ..routing import Routing
from .agreement import hit_share


def prefetch_metrics(before: Routing, after: Routing, budget: int | None = None) -> list[Metric]:
    """Return the share of ``after``'s assignments that a fetch of ``budget`` experts per token would find there.

    ``before`` is the routing of the MoE layer before, of the same tokens. Two predictors count on the first half of
    the tokens and are judged on the second: ``prefetch_popular`` fetches the experts that this layer uses most,
    ``prefetch_transition`` those most likely after the token's experts in ``before``. What the second finds beyond
    the first is what the layers know of each other. ``budget`` is the mean k of ``after``, rounded up, where none is
    given. Both are None without assignments to count or to judge. Takes memory for E x E and T x E numbers.
    """
    if before.num_tokens != after.num_tokens:
        raise ValueError(f"{before.num_tokens} and {after.num_tokens} tokens; give two routings of the same tokens.")
    half = after.num_tokens // 2
    seen, judged = (_rows(after, 0, half), _rows(after, half, after.num_tokens))
    entries = len(judged.token_N)
    names = ("prefetch_popular", "prefetch_transition")
    if not len(seen.token_N) or not entries:
        return [Metric(name, None, "share", n=entries) for name in names]
    budget = math.ceil(len(after.token_N) / after.num_tokens) if budget is None else budget
    budget = min(budget, after.num_experts)
    popular_E = seen.counts_E.double() / len(seen.token_N)
    scores_TE = transitions(_rows(before, 0, half), seen, popular_E, _rows(before, half, after.num_tokens))
    found = [_fetched(scores, judged, budget) for scores in (popular_E.expand_as(scores_TE), scores_TE)]
    return [Metric(name, value, "share", n=entries) for name, value in zip(names, found, strict=True)]


def transitions(before: Routing, after: Routing, prior_E: Tensor, now: Routing) -> Tensor:
    """Return scores_TE float64 of the next layer's experts for the tokens of ``now``, a routing like ``before``.

    The score of expert e' is the sum over a token's experts e of P(e' | e), counted in ``before`` and ``after`` with
    one more observation of each e that is spread like ``prior_E``; a token without experts has the prior.
    """
    count_EE = _chosen(before).T @ _chosen(after)
    given_EE = (count_EE + prior_E) / (count_EE.sum(1, keepdim=True) + 1)
    scores_TE = _chosen(now) @ given_EE
    return torch.where(now.k_T[:, None] > 0, scores_TE, prior_E)


def _rows(routing: Routing, start: int, stop: int) -> Routing:
    """Return the routing of tokens ``start`` to ``stop``, which are numbered from 0."""
    mask_N = (routing.token_N >= start) & (routing.token_N < stop)
    kept = routing.keep(mask_N)
    return Routing(kept.token_N - start, kept.expert_N, kept.weight_N, (stop - start, routing.num_experts))


def _chosen(routing: Routing) -> Tensor:
    """Return a float64 [T, E] with 1 at every entry."""
    one_N = torch.ones(len(routing.token_N), dtype=torch.float64, device=routing.token_N.device)
    return Routing(routing.token_N, routing.expert_N, one_N, routing.shape).to_dense()


def _fetched(scores_TE: Tensor, judged: Routing, budget: int) -> float | None:
    index_TB = scores_TE.topk(budget, dim=1).indices
    return hit_share(Routing.topk(index_TB, torch.ones_like(index_TB, dtype=torch.float64), judged.num_experts), judged)

"""How far two routings of the same tokens agree. Shape letters: T tokens, E expert ids, N assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Metric
from ..routing import Routing


def fluctuation(routing: Routing, other: Routing) -> list[Metric]:
    """Return how much the experts of the tokens change between two routings of the same shape.

    ``fluctuation_top1`` is the share of tokens whose heaviest expert is another, ``fluctuation_set`` the share whose
    set of experts is another (both after Graph of Tokens, arXiv 2505.00792), and ``jaccard_mean`` the mean over tokens
    of common experts over all experts of both, 1 where neither routing has any.
    """
    names = ("fluctuation_top1", "fluctuation_set", "jaccard_mean")
    tokens = routing.num_tokens
    top1_T, set_T, jaccard_T = agreement_per_token(routing, other).unbind(1)
    if tokens == 0:
        return [Metric(name, None, "share", n=0) for name in names]
    values = (1 - top1_T.mean(), 1 - set_T.mean(), jaccard_T.mean())
    return [Metric(name, float(value), "share", n=tokens) for name, value in zip(names, values, strict=True)]


def agreement_per_token(routing: Routing, other: Routing) -> Tensor:
    """Return [T, 3] float64: whether the heaviest expert is the same, whether the set is, and common over all experts.

    The last is the Jaccard index, 1 where neither routing has any expert.
    """
    common_T = torch.bincount(routing.token_N[kept_entries(routing, other)], minlength=routing.num_tokens)
    union_T = routing.k_T + other.k_T - common_T
    jaccard_T = torch.where(union_T > 0, common_T.double() / union_T.clamp(min=1), 1.0)
    same_T = heaviest(routing) == heaviest(other)
    return torch.stack([same_T.double(), (common_T == union_T).double(), jaccard_T], dim=1)


def heaviest(routing: Routing) -> Tensor:
    """Return each token's expert of the largest weight, [T] int64: the lowest id among equals, E where it has none."""
    weight_N = routing.weight_N.detach().double()
    lowest_T = weight_N.new_full((routing.num_tokens,), -torch.inf)
    best_T = lowest_T.scatter_reduce(0, routing.token_N, weight_N, "amax")
    best_N = weight_N == best_T[routing.token_N]
    none_T = routing.token_N.new_full((routing.num_tokens,), routing.num_experts)
    return none_T.scatter_reduce(0, routing.token_N[best_N], routing.expert_N[best_N], "amin")


def hit_share(predicted: Routing, actual: Routing) -> float | None:
    """Return the share of ``actual``'s assignments that ``predicted`` has too, None where there are none."""
    hits_N = kept_entries(actual, predicted)
    return float(hits_N.double().mean()) if len(hits_N) else None


def pairs(routing: Routing) -> Tensor:
    """Return token * E + expert of every entry, [N] int64: one number for each pair."""
    return routing.token_N * routing.num_experts + routing.expert_N


def kept_entries(routing: Routing, other: Routing) -> Tensor:
    """Return mask_N: which entries of ``routing`` are in ``other`` too."""
    if routing.shape != other.shape:
        raise ValueError(
            f"routings of shapes {routing.shape} and {other.shape} differ in tokens or experts; give two "
            "of one layer and the same tokens."
        )
    return torch.isin(pairs(routing), pairs(other))

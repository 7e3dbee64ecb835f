"""What the losses share: which tokens count, in which groups they lie, and which of them follow each other.

Shape letters: T tokens, V valid tokens, E expert ids, N assignments, G groups of tokens, C chunks, L tokens of a chunk,
P pairs of neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Context, Routing


def valid_tokens(routing: Routing, ctx: Context | None) -> Tensor:
    """Return valid_T bool: the tokens that are no padding."""
    if ctx is None or ctx.valid_T is None:
        return torch.ones(routing.num_tokens, dtype=torch.bool, device=routing.token_N.device)
    return ctx.valid_T


def given(value: Tensor | None, name: str) -> Tensor:
    """Return ``value``, a field of the Routing; ValueError where the router did not keep it."""
    if value is None:
        raise ValueError(f"this loss needs {name} in the Routing; use a router that scores every expert.")
    return value


def distributions(routing: Routing, ctx: Context | None) -> Tensor:
    """Return probs_VE of the valid tokens, each row summing to one (scores of a sigmoid or a ReLU do not)."""
    probs_VE = given(routing.probs_TE, "probs_TE")[valid_tokens(routing, ctx)]
    return probs_VE / probs_VE.sum(-1, keepdim=True).clamp(min=torch.finfo(probs_VE.dtype).tiny)


def groups(routing: Routing, ctx: Context | None, label_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (group_T int64, tokens_G int64): groups are the labels that valid tokens have, in ascending order.

    Padding has group -1. Without labels all tokens are one group.
    """
    valid_T = valid_tokens(routing, ctx)
    group_T = torch.full((routing.num_tokens,), -1, device=routing.token_N.device)
    label_V = torch.zeros(int(valid_T.sum()), dtype=torch.int64) if label_T is None else label_T[valid_T]
    _, group_V, tokens_G = torch.unique(label_V.to(group_T.device), return_inverse=True, return_counts=True)
    group_T[valid_T] = group_V
    return group_T, tokens_G


def neighbours(routing: Routing, ctx: Context | None) -> tuple[Tensor, Tensor]:
    """Return (before_P, after_P int64): each valid token and the next one of its segment."""
    order_V, segment_V, _ = _in_order(routing, ctx)
    same_P = segment_V[1:] == segment_V[:-1]
    return order_V[:-1][same_P], order_V[1:][same_P]


def chunks(routing: Routing, ctx: Context | None, length: int) -> Tensor:
    """Return token_CL int64: the valid tokens of each segment in chunks of ``length``; a shorter tail is left out."""
    order_V, segment_V, tokens_G = _in_order(routing, ctx)
    first_G = tokens_G.cumsum(0) - tokens_G
    place_V = torch.arange(len(order_V), device=order_V.device) - first_G[segment_V]
    whole_V = place_V < (tokens_G - tokens_G % length)[segment_V]
    return order_V[whole_V].reshape(-1, length)


def _in_order(routing: Routing, ctx: Context | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token_V, segment_V, tokens_G): the valid tokens segment by segment, each in the order of its tokens."""
    group_T, tokens_G = groups(routing, ctx, None if ctx is None else ctx.segment_T)
    order_T = group_T.argsort(stable=True)
    order_V = order_T[group_T[order_T] >= 0]
    return order_V, group_T[order_V], tokens_G

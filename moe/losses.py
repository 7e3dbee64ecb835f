"""Balance losses over a Routing, and the capacities that go with them.

Every loss takes a Routing and, where tokens may be padding, the Context with ``valid_T``; it returns a scalar that is
not yet multiplied by its coefficient. Shape letters: T tokens, E expert ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contracts import OWNERS
from .routing import Context, Routing


def balance_loss(routing: Routing, ctx: Context | None = None) -> Tensor:
    """Return E * sum_e f_e P_e, the loss of Switch (Fedus et al. 2021), on a scale that does not depend on k.

    f_e is the share of the entries that expert e has and P_e its mean probability, both summing to one, so perfect
    balance gives 1 and one expert for everything gives E. (transformers sums f over the k choices: k times as much.)
    Entries that a capacity has dropped do not count.
    """
    share_E = routing.counts_E / routing.counts_E.sum().clamp(min=1)
    return routing.num_experts * torch.dot(share_E.float(), mean_probability(routing, ctx))


def heterogeneous_loss(routing: Routing, eta_E: Tensor, k: int, ctx: Context | None = None) -> Tensor:
    """Return sum_e eta_e f_e P_e, the loss of MoE++ (arXiv 2410.07348): ``eta_E`` comes from ``eta``.

    f_e is the part of the tokens for which e is among the k most probable, so that sum_e f_e = k. It is read from the
    probabilities because a Routing has no entry for a slot that a zero expert took. With f = k P the smallest value is
    k / sum_e(1 / eta_e), where P_e is proportional to 1 / eta_e.
    """
    probs_TE = _valid_rows(_given(routing.probs_TE, "probs_TE"), ctx)
    chosen_E = torch.bincount(probs_TE.detach().topk(k, dim=-1).indices.flatten(), minlength=routing.num_experts)
    fraction_E = chosen_E / max(len(probs_TE), 1)
    return torch.dot(eta_E * fraction_E, mean_probability(routing, ctx))


def z_loss(routing: Routing, ctx: Context | None = None) -> Tensor:
    """Return mean_t logsumexp(z_t)^2, which keeps logits small (ST-MoE, arXiv 2202.08906)."""
    logits_TE = _valid_rows(_given(routing.logits_TE, "logits_TE"), ctx)
    return torch.logsumexp(logits_TE.float(), dim=-1).square().sum() / max(len(logits_TE), 1)


def mean_probability(routing: Routing, ctx: Context | None = None) -> Tensor:
    """Return P_E float32: probabilities normalised per token (sigmoid scores are not), averaged over valid tokens."""
    probs_TE = _valid_rows(_given(routing.probs_TE, "probs_TE"), ctx)
    total_T1 = probs_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(probs_TE.dtype).tiny)
    return (probs_TE / total_T1).sum(0) / max(len(probs_TE), 1)


def eta(kinds: Sequence[str], tau: float) -> Tensor:
    """Return eta_E float32 of MoE++: 1 for experts that own weights, ``tau`` for the others."""
    return torch.tensor([1.0 if kind in OWNERS else tau for kind in kinds])


def capacities(tokens: int, k: int, tau: float, ffn: int, others: int, gamma: float = 1.1) -> tuple[float, float]:
    """Return (slots of each FFN expert, slots of each other expert) by Eq. 8 of MoE++, not rounded.

    Eq. 8 says T where it must mean the k*T assignments: its capacities add up to gamma * T, so that with top-2 and
    gamma = 1.1 at least 45 % of all assignments would overflow even in perfect balance. Here they add up to
    gamma * k * T.
    """
    unit = gamma * k * tokens / (tau * ffn + others)
    return unit * tau, unit


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this loss needs {name} in the Routing; use a router that scores every expert.")
    return value


def _valid_rows(rows_TE: Tensor, ctx: Context | None) -> Tensor:
    return rows_TE if ctx is None or ctx.valid_T is None else rows_TE[ctx.valid_T]

"""Capacity: how many entries an expert takes, and which ones it drops, for any Routing.

A dropped entry leaves the Routing; a token without entries is what the residual stream carries. Shape letters: T
tokens, E expert ids, N assignments, G groups of tokens, C cells: one (group, expert) each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..contracts import OWNERS
from .balance.rows import groups
from .router import EPSILON, Router, RouterBundle
from .routing import Context, Routing
from .schedules import Schedule, value_at


@dataclass(frozen=True)
class CapacityRule:
    """An expert takes ceil(``factor`` * ``k`` * T / E) entries of T valid tokens, and at least ``least``.

    Which ones (``policy``): those of the first tokens (``position``; Switch, Fedus et al. 2021), those of the highest
    probability (``probs``; DeepSpeed), or a random subset (``random``: the random token selection of Z-code M3, arXiv
    2109.10465). With ``first_choices`` no second choice of a token is kept where that drops a first choice of another
    (GShard, arXiv 2006.16668); choices are ranked by the order of a token's entries.

    ``renormalize`` gives the weight of dropped entries to those of the same token that are kept, as GShard does, whose
    weights are normalised after the capacity; weights must not be negative.

    ``tau`` is MoE++'s share (arXiv 2410.07348): experts that own weights take ``tau`` times the entries of the others.
    Its Eq. 8 says T where it must mean k * T; ``k`` = 1 is what it says. ``per_segment`` counts within each sequence,
    as the Switch of transformers does, whose paper counts within the batch. ``factor`` may be a Schedule of progress.
    """

    factor: float | Schedule = 1.25
    k: int = 1
    policy: Literal["position", "probs", "random"] = "position"
    first_choices: bool = False
    renormalize: bool = False
    tau: float = 1.0
    least: int = 0
    per_segment: bool = False

    def __post_init__(self) -> None:
        if self.k < 1 or self.tau <= 0 or self.least < 0:
            raise ValueError(
                f"k={self.k} must be at least 1, tau={self.tau} positive, least={self.least} not negative."
            )

    def slots(self, tokens_G: Tensor, kinds: Sequence[str], progress: float = 1.0) -> Tensor:
        """Return slots_GE int64: what each expert takes of the valid tokens of each group."""
        factor = value_at(self.factor, progress)
        if factor <= 0:
            raise ValueError(f"a capacity factor of {factor} leaves no slots; give a positive one.")
        own = [kind in OWNERS for kind in kinds]
        of_ffn, of_other = capacities(1, self.k, self.tau, sum(own), len(own) - sum(own), factor)
        per_token_E = torch.tensor([of_ffn if ffn else of_other for ffn in own], dtype=torch.float64)
        slots_GE = tokens_G[:, None] * per_token_E.to(tokens_G.device)
        whole_GE = torch.ceil(slots_GE - 1e-9 * slots_GE)  # what is whole but for rounding is not one more
        return whole_GE.long().clamp(min=self.least)


def capacities(tokens: int, k: int, tau: float, ffn: int, others: int, gamma: float = 1.1) -> tuple[float, float]:
    """Return (slots of each FFN expert, slots of each other expert) by Eq. 8 of MoE++, not rounded.

    Eq. 8 says T where it must mean the k*T assignments: its capacities add up to gamma * T, so that with top-2 and
    gamma = 1.1 at least 45 % of all assignments would overflow even in perfect balance. Here they add up to
    gamma * k * T.
    """
    unit = gamma * k * tokens / (tau * ffn + others)
    return unit * tau, unit


def limit(routing: Routing, kinds: Sequence[str], rule: CapacityRule, ctx: Context | None = None) -> Routing:
    """Return the Routing without the entries that find their expert full; logits and probabilities stay.

    ``kinds`` has one entry per expert id. ``ctx.rng`` draws the priorities of ``random``.
    """
    group_T, tokens_G = groups(routing, ctx, ctx.segment_T if rule.per_segment and ctx is not None else None)
    routing = routing.keep(group_T[routing.token_N] >= 0)
    slots_GE = rule.slots(tokens_G, kinds, 1.0 if ctx is None else ctx.progress)
    cell_N = group_T[routing.token_N] * routing.num_experts + routing.expert_N
    keys = [cell_N, *([choices(routing)] if rule.first_choices else []), *_priorities(routing, rule, ctx)]
    order_N = _order(*keys, routing.token_N)
    count_C = torch.bincount(cell_N, minlength=slots_GE.numel())
    first_C = count_C.cumsum(0) - count_C
    sorted_N = cell_N[order_N]
    place_N = torch.arange(len(order_N), device=order_N.device) - first_C[sorted_N]
    kept_N = torch.empty_like(order_N, dtype=torch.bool)
    kept_N[order_N] = place_N < slots_GE.flatten()[sorted_N]
    kept = routing.keep(kept_N)
    return renormalized(routing, kept) if rule.renormalize else kept


def choices(routing: Routing) -> Tensor:
    """Return choice_N int64: 0 at the first entry of each token, 1 at its second, and so on."""
    order_N = routing.token_N.argsort(stable=True)
    first_T = routing.k_T.cumsum(0) - routing.k_T
    choice_N = torch.empty_like(order_N)
    choice_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_T[routing.token_N[order_N]]
    return choice_N


def renormalized(before: Routing, after: Routing) -> Routing:
    """Return ``after`` with each token's weights scaled to the sum that they had in ``before``."""
    if bool((before.weight_N < 0).any()):
        raise ValueError("weights of both signs cannot be renormalised after a capacity; use renormalize=False.")
    sums = [one.weight_N.new_zeros(one.num_tokens).index_add(0, one.token_N, one.weight_N) for one in (before, after)]
    return after.scaled((sums[0] / (sums[1] + EPSILON))[after.token_N])


def _priorities(routing: Routing, rule: CapacityRule, ctx: Context | None) -> list[Tensor]:
    """Return the key that the policy sorts by, the smallest first; none for ``position``."""
    if rule.policy == "position":
        return []
    if rule.policy == "probs":
        if routing.probs_TE is None:
            return [-routing.weight_N.detach()]
        return [-routing.probs_TE.detach()[routing.token_N, routing.expert_N]]
    if ctx is None or ctx.rng is None:
        raise ValueError("capacity policy 'random' needs rng in the Context; give a torch.Generator.")
    return [torch.rand(len(routing.token_N), generator=ctx.rng, device=ctx.rng.device).to(routing.token_N.device)]


def _order(*keys: Tensor) -> Tensor:
    """Return the order that sorts by the first key, equal ones by the second, and so on."""
    order_N = torch.arange(len(keys[0]), device=keys[0].device)
    for key_N in reversed(keys):
        order_N = order_N[key_N[order_N].argsort(stable=True)]
    return order_N


class Capacity(Router):
    """A router whose Routing is cut to a capacity; everything else is the router's own.

    It is causal only where the router is and earlier tokens always come first.
    """

    def __init__(self, router: Router, kinds: Sequence[str], rule: CapacityRule) -> None:
        super().__init__()
        self.router = router
        self.kinds = tuple(kinds)
        self.rule = rule
        read = {
            "rng": rule.policy == "random",
            "segment_T": rule.per_segment,
            "progress": isinstance(rule.factor, Schedule),
        }
        self.needs = router.needs | {name for name, wanted in read.items() if wanted}
        self.causal = router.causal and rule.policy == "position" and not rule.first_choices
        self.scope = router.scope

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the router's Routing without the entries that find their expert full."""
        return limit(self.router(x_TH, ctx), self.kinds, self.rule, ctx)

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Hand everything on to the router."""
        self.router.update(routing, signal)


def with_capacity(bundle: RouterBundle, rule: CapacityRule) -> RouterBundle:
    """Return the bundle with its router cut to a capacity."""
    return replace(bundle, router=Capacity(bundle.router, bundle.kinds, rule))

"""Online dynamic pruning (ODP) of MC-MoE: a token whose lowest expert weighs little does without it.

A token's lowest expert is dropped where its weight is below beta times the highest one's; beta is the median of that
ratio on calibration tokens, of each layer its own, so that about half of the tokens lose one. The paper (arXiv
2410.06270) has two experts per token. With more, still the lowest alone can go, held against the highest; a token with
one expert keeps it. The most important tokens are protected: importance is the token's |h|_1 times the attention that
it receives. Shape letters: T tokens, H hidden, N assignments, B sequences, S positions of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .capacity import renormalized
from .router import Router, RouterBundle
from .routing import Context, Routing


@dataclass(frozen=True)
class PruningRule:
    """Drop a token's lowest expert where its weight is below ``beta`` times the highest one's.

    ``beta`` None is not known yet: the median on calibration tokens, see ``OnlinePruning.calibration``. The share
    ``protect`` of the tokens of a call, rounded down, is never pruned: those of the largest importance, which is the
    paper's with ``importance="attention"``, the ``norm`` |h|_1 alone with that, and drawn with ``random``, the control
    of protection. The weight of what is dropped goes to the experts that are kept. ``by="random"`` is the control of
    the rule: as many tokens lose their lowest expert, drawn among those that have a second one and are not protected.
    With a ``rate``, which ``by="ratio"`` does not read, each of these loses it with that probability instead, so that
    how many there are does not depend on later tokens.
    """

    beta: float | None
    protect: float = 0.02
    by: Literal["ratio", "random"] = "ratio"
    importance: Literal["attention", "norm", "random"] = "attention"
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be a finite number, and not negative.")
        if not 0 <= self.protect <= 1:
            raise ValueError(f"protect={self.protect} must lie in [0, 1].")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate={self.rate} must lie in [0, 1].")

    @property
    def reads_beta(self) -> bool:
        """Whether ``beta`` matters: not where a ``rate`` says how many tokens chance takes."""
        return self.by == "ratio" or self.rate is None


def median_ratio(routing: Routing) -> float:
    """Return beta of a layer: the median, over tokens of two experts or more, of the lowest weight by the highest."""
    ratio_T, pair_T, _ = _ratios(routing)
    if not bool(pair_T.any()):
        raise ValueError("no calibration token has a second expert; online pruning wants top-2 or more.")
    return float(ratio_T[pair_T].double().quantile(0.5))


def attention_received(attn: Tensor) -> Tensor:
    """Return what each token receives, [T] of T = B S: the mean over heads and over itself and all later queries.

    ``attn`` is [B, heads, S, S], queries before keys, rows that sum to one; what lies above the diagonal is not read.
    The last token has no later query, therefore its own counts.
    """
    share_BSS = attn.mean(dim=1).tril()
    queries_S = torch.arange(share_BSS.shape[-1], 0, -1, device=attn.device)
    return (share_BSS.sum(dim=1) / queries_S).flatten()


def importance(x_TH: Tensor, attn: Tensor | None = None) -> Tensor:
    """Return |h|_1 times the attention received, [T]; without ``attn`` the norm alone, which is not the paper's."""
    norm_T = x_TH.abs().sum(dim=-1)
    if attn is None:
        return norm_T
    received_T = attention_received(attn)
    if received_T.shape != norm_T.shape:
        raise ValueError(
            f"attention is of {len(received_T)} tokens and the layer reads {len(norm_T)}; give both alike."
        )
    return norm_T * received_T


def prune_lowest(
    routing: Routing, importance_T: Tensor, rule: PruningRule, rng: torch.Generator | None = None
) -> Routing:
    """Return the Routing without the entries that ``rule`` drops, its weights scaled to the sums that they had.

    ``importance_T`` may be that of the first tokens alone: the others are then not protected.
    """
    ratio_T, pair_T, lowest_T = _ratios(routing)
    free_T = pair_T
    free_T[: len(importance_T)] &= ~protected(importance_T, rule.protect)
    drop_T = free_T & _light(ratio_T, rule)
    if rule.by == "random":
        drop_T = _drawn(free_T, int(drop_T.sum()), rule.rate, rng)
    kept_N = torch.ones_like(routing.token_N, dtype=torch.bool)
    kept_N[lowest_T[drop_T]] = False
    return renormalized(routing, routing.keep(kept_N))


def protected(importance_T: Tensor, share: float) -> Tensor:
    """Return whether each token is among the ``share`` most important, rounded down; of equals the earlier ones."""
    count = int(share * len(importance_T) + 1e-9)
    order_T = importance_T.argsort(descending=True, stable=True)
    chosen_T = torch.zeros_like(importance_T, dtype=torch.bool)
    chosen_T[order_T[:count]] = True
    return chosen_T


def _light(ratio_T: Tensor, rule: PruningRule) -> Tensor:
    """Return whether each token's lowest expert weighs too little, [T] bool; nowhere where ``beta`` does not matter."""
    if not rule.reads_beta:
        return torch.zeros_like(ratio_T, dtype=torch.bool)
    if rule.beta is None:
        raise ValueError("beta is the median on calibration tokens; calibrate the router first, or give beta.")
    return ratio_T < rule.beta


def _drawn(free_T: Tensor, count: int, rate: float | None, rng: torch.Generator | None) -> Tensor:
    if rng is None:
        raise ValueError("pruning by 'random' needs rng in the Context; give a torch.Generator.")
    if rate is not None:
        return free_T & (torch.rand(len(free_T), generator=rng, device=rng.device).to(free_T.device) < rate)
    free = free_T.nonzero().flatten()
    draw = torch.randperm(len(free), generator=rng, device=rng.device)[:count].to(free.device)
    chosen_T = torch.zeros_like(free_T)
    chosen_T[free[draw]] = True
    return chosen_T


def _ratios(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Return lowest / highest weight of each token, whether it has two experts, and the entry of the lowest.

    Of equal weights the last entry is the lowest. A token without entries has entry 0, which is not to be used.
    """
    weight_N = routing.weight_N.detach()
    if bool((weight_N < 0).any()):
        raise ValueError("weights of both signs have no lowest; prune a routing whose weights are not negative.")
    order_N = torch.arange(len(weight_N), device=weight_N.device).flip(0)
    order_N = order_N[weight_N[order_N].argsort(stable=True)]
    order_N = order_N[routing.token_N[order_N].argsort(stable=True)]
    if len(order_N) == 0:
        empty_T = torch.zeros(routing.num_tokens, device=weight_N.device)
        return empty_T, empty_T.bool(), empty_T.long()
    first_T = (routing.k_T.cumsum(0) - routing.k_T).clamp(max=len(order_N) - 1)
    last_T = (first_T + routing.k_T - 1).clamp(min=0)
    lowest_T = order_N[first_T]
    highest_T = weight_N[order_N[last_T]]
    tiny = torch.finfo(weight_N.dtype).tiny
    return weight_N[lowest_T] / highest_T.clamp(min=tiny), routing.k_T >= 2, lowest_T


class OnlinePruning(Router):
    """A router whose Routing is pruned token by token; everything else is the router's own.

    Protection ranks the tokens of one call, so that with it, or with as many random choices, later tokens matter to
    earlier ones. Importance by attention reads ``attn`` of the Context. Where the Context names a ``prompt``, its
    tokens alone are ranked, by attention among themselves, and protected.
    """

    def __init__(self, router: Router, rule: PruningRule) -> None:
        super().__init__()
        self.router = router
        self.rule = rule
        drawn = rule.by == "random" or (rule.protect > 0 and rule.importance == "random")
        read = {"attn": rule.protect > 0 and rule.importance == "attention", "rng": drawn}
        self.needs = router.needs | {name for name, wanted in read.items() if wanted}
        self.causal = router.causal and rule.protect == 0 and (rule.by == "ratio" or rule.rate is not None)
        self.scope = router.scope

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the router's Routing without the entries that the rule drops."""
        return prune_lowest(self.router(x_TH, ctx), self._importance(x_TH, ctx), self.rule, ctx.rng)

    def _importance(self, x_TH: Tensor, ctx: Context) -> Tensor:
        prompt = len(x_TH) if ctx.prompt is None else ctx.prompt
        if self.rule.importance == "random" and self.rule.protect > 0:
            if ctx.rng is None:
                raise ValueError("protection by 'random' needs rng in the Context; give a torch.Generator.")
            return torch.rand(prompt, generator=ctx.rng, device=ctx.rng.device).to(x_TH.device)
        if self.rule.protect == 0 or self.rule.importance == "norm":
            return importance(x_TH[:prompt])
        if ctx.attn is None:
            raise ValueError("protection by 'attention' needs attn in the Context; give it, or importance='norm'.")
        return importance(x_TH[:prompt], ctx.attn[..., :prompt, :prompt] if ctx.prompt is not None else ctx.attn)

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Hand everything on to the router."""
        self.router.update(routing, signal)

    def calibration(self, x_TH: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Return ``beta``: the median ratio of what its router chooses, unpruned, for ``x_TH``."""
        return {"beta": torch.tensor(median_ratio(self.router(x_TH, ctx)), dtype=torch.float64)}

    def adopt(self, told: Mapping[str, Tensor]) -> None:
        """Prune by the ``beta`` of ``calibration`` from now on."""
        self.rule = replace(self.rule, beta=float(told["beta"]))


def with_online_pruning(bundle: RouterBundle, rule: PruningRule) -> RouterBundle:
    """Return the bundle with its router pruned online by ``rule``."""
    return replace(bundle, router=OnlinePruning(bundle.router, rule))

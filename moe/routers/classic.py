"""Four classic gates: GShard, X-MoE's cosine scores and expert choice; the sigmoid gate is in the top-k family.

Shape letters: T tokens, H hidden, E expert ids, D dimensions of the cosine, N tokens that experts choose among,
C places of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import Linear, Pipeline, Router, RouterBundle, TopK, router_rows, seeded_normal, weighter
from ..router_context import needed, number_segments
from ..router_parts import gumbel_noise
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.classic import ExpertChoice as ExpertChoiceParams
    from ..router_params.classic import GShard as GShardParams
    from ..router_params.classic import XMoE
    from ..shapes import ModelShape


# --- GShard ----------------------------------------------------------------------------------------------------------


class GShard(Router):
    """The best expert, and a second one, in training by chance (GShard, arXiv 2006.16668)."""

    needs = frozenset({"rng"})

    def __init__(self, scorer: nn.Module, second: Literal["random", "gumbel"]) -> None:
        super().__init__()
        self.scorer = scorer
        self.second = second

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``; the first entry of a token is its first choice."""
        logits_TE = self.scorer(x_TH, ctx).float()
        probs_TE = logits_TE.softmax(-1)
        experts = logits_TE.shape[1]
        indices_T2 = self._choices(logits_TE.detach(), ctx)
        weights_T2 = probs_TE.gather(1, indices_T2)
        weights_T2 = weights_T2 / weights_T2.sum(-1, keepdim=True)
        kept_T2 = torch.ones_like(indices_T2, dtype=torch.bool)
        if self.second == "random" and ctx.training:
            rng = needed(ctx, "rng")
            chance_T = torch.rand(len(x_TH), generator=rng, device=rng.device).to(x_TH.device)
            kept_T2[:, 1] = chance_T < 2 * weights_T2[:, 1].detach()
        if ctx.valid_T is not None:
            kept_T2 = kept_T2 & ctx.valid_T[:, None]
        indices_T2 = indices_T2.masked_fill(~kept_T2, experts)
        return Routing.topk(indices_T2, weights_T2, experts, logits_TE, probs_TE)

    def _choices(self, logits_TE: Tensor, ctx: Context) -> Tensor:
        """Return indices_T2 int64: the best expert, and the best of the others, with noise in training."""
        first_T1 = logits_TE.argmax(-1, keepdim=True)
        if self.second == "gumbel" and ctx.training:
            logits_TE = logits_TE + gumbel_noise(logits_TE, needed(ctx, "rng"))
        second_T1 = logits_TE.scatter(1, first_T1, float("-inf")).argmax(-1, keepdim=True)
        return torch.cat([first_T1, second_T1], dim=-1)


def build_gshard(params: GShardParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of GShard's gate."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        return RouterBundle(GShard(Linear(router_rows(weights, shape, seed)), params.second), kinds)

    return factory


# --- X-MoE -----------------------------------------------------------------------------------------------------------


class Cosine(nn.Module):
    """z_e = s cos(P x (+ b), m_e) in float32, with s = min(exp(log_scale), 100) (X-MoE, arXiv 2204.09179)."""

    MOST = math.log(100)

    def __init__(self, map_DH: Tensor, bias_D: Tensor | None, rows_ED: Tensor, scale: float) -> None:
        super().__init__()
        self.map = Linear(map_DH, bias_D)
        self.rows_ED = nn.Parameter(rows_ED.detach().float().clone())
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        point_TD = nnf.normalize(self.map(x_TH, ctx), dim=-1)
        return nnf.linear(point_TD, nnf.normalize(self.rows_ED, dim=-1)) * self.log_scale.clamp(max=self.MOST).exp()


def build_xmoe(params: XMoE) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of X-MoE's gate, seeded whole: a linear router that the layer has does not fit it."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        selection = params.selection(shape)
        std = shape.hidden**-0.5
        scorer = Cosine(
            seeded_normal((params.dim, shape.hidden), std, seed, "xmoe.map"),
            seeded_normal((params.dim,), std, seed, "xmoe.bias") if params.bias else None,
            seeded_normal((shape.experts, params.dim), 0.01, seed, "xmoe.rows"),
            1 / params.temperature,
        )
        return RouterBundle(Pipeline(scorer, TopK(selection.k), weighter(selection)), params.kinds(shape))

    return factory


# --- expert choice ---------------------------------------------------------------------------------------------------


class ExpertChoice(Router):
    """Every expert takes its ceil(k N / E) best of N tokens (expert choice, arXiv 2202.09368); padding counts nowhere.

    The tokens are those of the batch, or of each segment in turn.
    """

    causal = False

    def __init__(self, scorer: nn.Module, k: int, per: Literal["batch", "segment"]) -> None:
        super().__init__()
        self.scorer = scorer
        self.k = k
        self.per = per
        self.needs = frozenset({"segment_T"} if per == "segment" else ())

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``, expert by expert within each group of tokens."""
        logits_TE = self.scorer(x_TH, ctx)
        probs_TE = logits_TE.float().softmax(-1)
        chosen = [self._choose(probs_TE, token_N) for token_N in self._groups(ctx, probs_TE)]
        token_N, expert_N, weight_N = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        return Routing(token_N, expert_N, weight_N, (len(x_TH), probs_TE.shape[1]), logits_TE, probs_TE)

    def _choose(self, probs_TE: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (token, expert, weight) of what every expert takes of ``token_N``."""
        experts = probs_TE.shape[1]
        places = math.ceil(self.k * len(token_N) / experts)
        weight_EC, place_EC = probs_TE[token_N].T.topk(places, dim=-1)
        expert_EC = torch.arange(experts, device=probs_TE.device)[:, None].expand_as(place_EC)
        return token_N[place_EC.flatten()], expert_EC.flatten(), weight_EC.flatten()

    def _groups(self, ctx: Context, probs_TE: Tensor) -> list[Tensor]:
        """Return the tokens among which experts choose, at least one group of them, none of them padding."""
        tokens = len(probs_TE)
        valid_T = torch.ones(tokens, dtype=torch.bool, device=probs_TE.device) if ctx.valid_T is None else ctx.valid_T
        if self.per == "batch":
            return [valid_T.nonzero().flatten()]
        segment_T, segments = number_segments(ctx, tokens)
        return [((segment_T == segment) & valid_T).nonzero().flatten() for segment in range(max(segments, 1))]


def build_expert_choice(params: ExpertChoiceParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of expert choice."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        router = ExpertChoice(Linear(router_rows(weights, shape, seed)), params.k, params.per)
        return RouterBundle(router, kinds)

    return factory

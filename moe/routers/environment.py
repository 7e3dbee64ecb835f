"""Routers that give all tokens of an environment or a sequence one expert: MixER and the outer layer of DMoERM.

Shape letters: T tokens, H hidden, E expert ids, S environments or sequences, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import Linear, One, RouterBundle, TopK, router_rows, seeded_normal
from ..router_context import ContextPipeline, features_per_token, number_segments
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.environment import DMoERM as OuterParams
    from ..router_params.environment import MixER as MixERParams
    from ..shapes import ModelShape

ROUNDS = 20
TOLERANCE = 1e-4
NOISE = 1e-4


# --- MixER -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvironmentLosses:
    """What MixER refits its map on: the context vectors and the loss that each expert has in each environment."""

    features_SD: Tensor
    loss_SE: Tensor


class EnvironmentMap(nn.Module):
    """z = W [xi; 1] for the context vector xi of the token's environment; W is a buffer that no gradient reaches."""

    map_ED1: Tensor

    def __init__(self, map_ED1: Tensor) -> None:
        super().__init__()
        self.register_buffer("map_ED1", map_ED1)

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE float32; only the number of tokens is read from ``x_TH``."""
        features_SD, segment_T = features_per_token(ctx, len(x_TH))
        wanted = self.map_ED1.shape[1] - 1
        if features_SD.shape[1:] != (wanted,):
            raise ValueError(f"a context vector has {tuple(features_SD.shape[1:])} features where {wanted} are mapped.")
        return (with_one(features_SD.to(self.map_ED1.dtype)) @ self.map_ED1.T)[segment_T]


class MixER(ContextPipeline):
    """The expert of an environment; ``update`` refits the map (arXiv 2502.05058).

    The paper draws its first cluster centres at random. Here they are the context vectors farthest from those taken
    before, so that well separated clusters are found without luck; and the fit has the constant 1 that the map has.
    """

    scorer: EnvironmentMap
    refits: Tensor

    def __init__(self, scorer: EnvironmentMap, seed: int) -> None:
        super().__init__(scorer, TopK(1), One(), {"features", "segment_T"})
        self.seed = seed
        self.register_buffer("refits", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, routing: Routing, signal: EnvironmentLosses | None = None) -> None:
        """Refit the map to ``signal``; nothing changes without one, nor where the clusters cannot be told apart."""
        if signal is None:
            return
        map_ED1 = self.scorer.map_ED1
        cluster_S = k_means(signal.features_SD, len(map_ED1))
        if cluster_S is None:
            return
        expert_S = experts_of_clusters(cluster_S, signal.loss_SE)[cluster_S]
        noise_SD = seeded_normal(signal.features_SD.shape, NOISE, self.seed, f"mixer.noise.{int(self.refits)}")
        self.refits += 1
        map_ED1.copy_(fit_map(signal.features_SD + noise_SD.to(signal.features_SD), expert_S, len(map_ED1)))


def with_one(features_SD: Tensor) -> Tensor:
    """Return [xi; 1] of every environment."""
    return torch.cat([features_SD, features_SD.new_ones(len(features_SD), 1)], dim=1)


def k_means(features_SD: Tensor, clusters: int) -> Tensor | None:
    """Return the cluster of each environment, [S] int64, by mean absolute distance to the clusters' means.

    None where a cluster is left empty or ``ROUNDS`` rounds do not settle: the paper then skips the update.
    """
    if len(features_SD) < clusters:
        return None
    centre_ED = _distant_rows(features_SD, clusters)
    for _ in range(ROUNDS):
        cluster_S = _distance(features_SD, centre_ED).argmin(1)
        member_ES = nnf.one_hot(cluster_S, clusters).T.to(features_SD.dtype)
        if not bool(member_ES.any(1).all()):
            return None
        moved_ED = member_ES @ features_SD / member_ES.sum(1, keepdim=True)
        if bool(((moved_ED - centre_ED).abs() <= TOLERANCE).all()):
            return cluster_S
        centre_ED = moved_ED
    return None


def _distance(features_SD: Tensor, centre_ED: Tensor) -> Tensor:
    return (features_SD[:, None] - centre_ED).abs().mean(-1)


def _distant_rows(features_SD: Tensor, count: int) -> Tensor:
    """Return ``count`` rows, the first the farthest from the mean, each further one the farthest from those taken."""
    nearest_S = _distance(features_SD, features_SD.mean(0, keepdim=True))[:, 0]
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(nearest_S.argmax()))
        distance_S = _distance(features_SD, features_SD[chosen[-1:]])[:, 0]
        nearest_S = distance_S if len(chosen) == 1 else torch.minimum(nearest_S, distance_S)
    return features_SD[chosen]


def experts_of_clusters(cluster_S: Tensor, loss_SE: Tensor) -> Tensor:
    """Return one expert per cluster, [E] int64, no two alike: in the order of clusters, each takes the best left.

    Best is the lowest median loss over the environments of the cluster.
    """
    chosen: list[int] = []
    for cluster in range(loss_SE.shape[1]):
        median_E = loss_SE[cluster_S == cluster].quantile(0.5, dim=0)
        median_E[chosen] = float("inf")
        chosen.append(int(median_E.argmin()))
    return torch.tensor(chosen, device=cluster_S.device)


def fit_map(features_SD: Tensor, expert_S: Tensor, experts: int) -> Tensor:
    """Return W_ED1, the least-squares map from [xi; 1] to the one-hot expert of each environment."""
    target_SE = nnf.one_hot(expert_S, experts).double()
    map_D1E: Tensor = torch.linalg.lstsq(with_one(features_SD.double()), target_SE).solution
    return map_D1E.T


def build_mixer(params: MixERParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory; the map starts at random. A router that the layer has is not used."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        map_ED1 = seeded_normal((shape.experts, params.features + 1), params.features**-0.5, seed, "mixer.map")
        return RouterBundle(MixER(EnvironmentMap(map_ED1), seed), params.kinds(shape))

    return factory


# --- the outer layer of DMoERM ---------------------------------------------------------------------------------------


class LastToken(nn.Module):
    """The scores of the last valid token of its sequence, for every token: z_t = scorer(x)_last(t)."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE."""
        segment_T, segments = number_segments(ctx, len(x_TH))
        place_T = torch.arange(len(x_TH), device=segment_T.device)
        if ctx.valid_T is not None:
            place_T = place_T.masked_fill(~ctx.valid_T, 0)
        last_S = place_T.new_zeros(segments).scatter_reduce(0, segment_T, place_T, "amax")
        logits_SE: Tensor = self.scorer(x_TH[last_S], ctx)
        return logits_SE[segment_T]


def build_dmoerm(params: OuterParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of the outer layer, which looks ahead: the last token decides for those before it."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        scorer = LastToken(Linear(router_rows(weights, shape, seed)))
        return RouterBundle(ContextPipeline(scorer, TopK(1), One(), {"segment_T"}, causal=False), params.kinds(shape))

    return factory

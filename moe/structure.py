"""Structures: what the experts of a layer are. ``split`` cuts a dense gated FFN into experts by channel.

A gated FFN is a sum over its channels, y = sum_f h_f down[:, f] with h = act(gate x) * up x, so any partition of the
channels into slices is a partition of y: all slices together are the FFN, exactly (MoEfication, arXiv 2110.01786).

Shape letters: T tokens, F channels of the dense FFN, E experts, C = F / E channels of one expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .layer import LayerWeights, SharedExpert, ffn_hidden
from .plugins import Keep, Split

StructureStep = Callable[[LayerWeights, Tensor, int], LayerWeights]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties tried, as fractions of the mean variance of the activations."""

CLUSTER_ROUNDS = 10


def keep(params: Keep) -> StructureStep:
    """Structure ``none``: the model's own experts."""
    return lambda weights, activations_TH, seed: weights


def split(params: Split) -> StructureStep:
    """Structure ``split``: a dense gated FFN as ``experts - shared`` routed slices, a shared one, and a fitted router.

    The router is linear and predicts how much each slice contributes to a token (``contribution_targets``), so that
    the top-k of ``router_EH @ x`` are the slices whose loss would hurt most.
    """

    def build(weights: LayerWeights, activations_TH: Tensor, seed: int) -> LayerWeights:
        check_cut(weights, activations_TH, params.experts, "split")
        x_TH = activations_TH.float()
        contribution_TF = channel_contributions(weights, x_TH)
        channels_EC = assign_channels(contribution_TF, params.experts, params.assignment, seed)
        rate_E = activation_rates(contribution_TF, channels_EC, (params.k + params.shared) / params.experts)
        ranked_E = torch.argsort(rate_E, descending=True, stable=True)
        shared_S = channels_EC[ranked_E[: params.shared]].flatten()
        return slices_with_router(weights, x_TH, channels_EC[ranked_E[params.shared :].sort().values], shared_S)

    return build


def check_cut(weights: LayerWeights, activations_TH: Tensor, experts: int, name: str) -> None:
    """Raise ValueError where structure ``name`` cannot cut the layer, or has no tokens to fit its router on."""
    if not weights.is_dense or not weights.gated or weights.shared is not None:
        raise ValueError(f"'{name}' wants one dense gated FFN; choose structure 'none' for a model with experts.")
    if weights.down.shape[1] % experts:
        raise ValueError(f"width {weights.down.shape[1]} cannot be cut into {experts} equal experts.")
    if len(activations_TH) == 0:
        raise ValueError(f"'{name}' fits its router on activations and got no tokens; ask for calibration tokens.")


def slices_with_router(weights: LayerWeights, x_TH: Tensor, routed_EC: Tensor, shared_S: Tensor) -> LayerWeights:
    """Return the channels of each row as an expert, those of ``shared_S`` (it may be empty) as the shared one.

    The router is fitted on ``x_TH`` float32 to tell the experts' contributions.
    """
    gate_up, down = cut(weights, routed_EC)
    router_EH = fit_router(x_TH, contribution_targets(gate_up, down, x_TH, weights.activation))
    shared = shared_slice(weights, shared_S) if len(shared_S) else None
    return replace(weights, gate_up=gate_up, down=down, router_EH=router_EH, shared=shared)


def channel_contributions(weights: LayerWeights, x_TH: Tensor) -> Tensor:
    """Return |h_f| * norm of down[:, f], [T, F] float32: how long the vector is that channel f adds to y."""
    hidden_TF = ffn_hidden(x_TH, weights.gate_up.to(x_TH.dtype), weights.activation)
    length_F: Tensor = torch.linalg.vector_norm(weights.down.to(x_TH.dtype), dim=0)
    return hidden_TF.abs() * length_F


def assign_channels(contribution_TF: Tensor, experts: int, assignment: str, seed: int) -> Tensor:
    """Return which channels each expert owns, [E, C] int64, each row rising; together a permutation of F."""
    width = contribution_TF.shape[1]
    if assignment == "contiguous":
        return torch.arange(width).view(experts, -1)
    owner_F = cluster_balanced(standardise(contribution_TF, dim=0).T, experts, seed)
    return torch.argsort(owner_F, stable=True).view(experts, -1)


def cluster_balanced(points_FT: Tensor, clusters: int, seed: int) -> Tensor:
    """Return the cluster of each row, [F] int64, all of one size: spherical k-means with balanced assignment.

    Rows are compared by correlation. The first centres are seeded draws, each far from those before it.
    """
    points_FT = nnf.normalize(points_FT, dim=1)
    centres_ET = _first_centres(points_FT, clusters, torch.Generator().manual_seed(seed))
    owner_F = assign_balanced(points_FT @ centres_ET.T)
    for _ in range(CLUSTER_ROUNDS):
        sums_ET = torch.zeros_like(centres_ET).index_add(0, owner_F, points_FT)
        moved_F = assign_balanced(points_FT @ nnf.normalize(sums_ET, dim=1).T)
        if torch.equal(moved_F, owner_F):
            break
        owner_F = moved_F
    return owner_F


def _first_centres(points_FT: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Return seeded centres [E, T], each drawn with a probability that grows with its distance (k-means++)."""
    chosen = [int(torch.randint(len(points_FT), (1,), generator=generator))]
    for _ in range(clusters - 1):
        nearest_F = (points_FT @ points_FT[chosen].T).amax(dim=1)
        chosen.append(int(torch.multinomial((1 - nearest_F).clamp(min=1e-6), 1, generator=generator)))
    return points_FT[chosen]


def assign_balanced(affinity_FE: Tensor) -> Tensor:
    """Return one cluster per row, [F] int64, each taken F / E times.

    In every round each free row asks for the cluster with room that it is nearest to, and a cluster with too many
    keeps the nearest; at least one cluster fills up in a round, so there are at most E rounds.
    """
    rows, clusters = affinity_FE.shape
    owner_F = torch.full((rows,), -1)
    room = [rows // clusters] * clusters
    affinity_FE = affinity_FE.clone()
    while bool((owner_F < 0).any()):
        free_F = (owner_F < 0).nonzero().flatten()
        wish_F = affinity_FE[free_F].argmax(dim=1)
        for cluster in range(clusters):
            asking = free_F[wish_F == cluster]
            order = torch.argsort(affinity_FE[asking, cluster], descending=True, stable=True)
            taken = asking[order[: room[cluster]]]
            owner_F[taken] = cluster
            room[cluster] -= len(taken)
            if room[cluster] == 0:
                affinity_FE[:, cluster] = -torch.inf
    return owner_F


def activation_rates(contribution_TF: Tensor, channels_EC: Tensor, budget: float) -> Tensor:
    """Return how often each slice's channels are wanted, [E]: the mean over its channels and the tokens.

    A token wants the share ``budget`` of its channels that contribute most, as many as will run for it.
    """
    wanted = max(1, round(budget * contribution_TF.shape[1]))
    active_TF = torch.zeros_like(contribution_TF)
    active_TF.scatter_(1, contribution_TF.topk(wanted, dim=1).indices, 1.0)
    return active_TF.mean(dim=0)[channels_EC].mean(dim=1)


def cut(weights: LayerWeights, channels_EC: Tensor) -> tuple[Tensor, Tensor]:
    """Return (gate_up [E, 2C, H], down [E, H, C]) of the slices, in the dtype of ``weights``."""
    gate_FH, up_FH = weights.gate_up.chunk(2, dim=0)
    gate_up = torch.cat([gate_FH[channels_EC], up_FH[channels_EC]], dim=1)
    return gate_up, weights.down.T[channels_EC].transpose(1, 2).contiguous()


def shared_slice(weights: LayerWeights, channels_S: Tensor) -> SharedExpert:
    """Return the channels as one ungated shared expert of width S."""
    gate_up, down = cut(weights, channels_S[None])
    return SharedExpert(gate_up[0], down[0], activation=weights.activation)


def contribution_targets(gate_up: Tensor, down: Tensor, x_TH: Tensor, activation: str) -> Tensor:
    """Return what the router should predict, [T, E]: f_e(x) . y(x), standardised over the experts of each token.

    y is the sum of all slices, so f_e . y / |y|^2 is the share of y that slice e makes; it also counts what slices
    cancel in each other, which their norms do not. Standardising keeps the order within a token and lets every token
    count the same; without it a few tokens with massive activations would decide the fit.
    """
    hidden = [ffn_hidden(x_TH, part.to(x_TH.dtype), activation) for part in gate_up]
    columns = down.to(x_TH.dtype).unbind()
    y_TH = torch.zeros_like(x_TH)
    for hidden_TC, down_HC in zip(hidden, columns, strict=True):
        y_TH += nnf.linear(hidden_TC, down_HC)
    shares = [(hidden_TC * (y_TH @ down_HC)).sum(dim=1) for hidden_TC, down_HC in zip(hidden, columns, strict=True)]
    return standardise(torch.stack(shares, dim=1), dim=1)


def standardise(values: Tensor, dim: int) -> Tensor:
    """Return ``values`` with mean 0 and deviation 1 along ``dim`` (0 where they do not vary)."""
    centred = values - values.mean(dim=dim, keepdim=True)
    deviation = centred.square().mean(dim=dim, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def fit_router(x_TH: Tensor, target_TE: Tensor) -> Tensor:
    """Return router_EH float32, the ridge regression of ``target_TE`` on ``x_TH`` without intercept.

    Of the penalties RIDGES the one that predicts every fifth token best, fitted on the others, is used for all tokens.
    """
    x, target = x_TH.double(), target_TE.double()
    held = torch.arange(len(x)) % 5 == 4
    fitted, aside = (x[~held], target[~held]), (x[held], target[held])

    def miss(ridge: float) -> float:
        return float((aside[0] @ ridge_solution(*fitted, ridge) - aside[1]).square().mean())

    best = min(RIDGES, key=miss) if bool(held.any()) else RIDGES[-1]
    return ridge_solution(x, target, best).T.float().contiguous()


def ridge_solution(x_TH: Tensor, target_TE: Tensor, ridge: float) -> Tensor:
    """Return the [H, E] that minimises |x W - target|^2 + ridge * mean diagonal of x'x * |W|^2."""
    gram_HH = x_TH.T @ x_TH
    penalty = ridge * gram_HH.diagonal().mean().clamp(min=torch.finfo(gram_HH.dtype).tiny)
    system_HH = gram_HH + penalty * torch.eye(len(gram_HH), dtype=gram_HH.dtype)
    solution_HE: Tensor = torch.linalg.solve(system_HH, x_TH.T @ target_TE)
    return solution_HE

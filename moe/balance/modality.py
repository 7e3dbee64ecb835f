"""Losses that give modalities experts of their own. Balance within each is loss ``modality``.

Shape letters: T tokens, V valid tokens, E expert ids, M modalities, G modalities that have tokens, P pairs of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Context, Routing
from .load import mean_probabilities
from .rows import distributions, groups, valid_tokens


def modality_l1(routing: Routing, ctx: Context | None = None, *, experts_ME: Tensor) -> Tensor:
    """Return the mean over tokens and experts of abs(p_te - m_e): Uni-MoE's distinct loss (arXiv 2405.11273).

    m is the row of ``experts_ME`` (bool) of the token's modality, 1 at each expert that is meant for it. A modality
    without experts (text, in the paper's code) counts among the tokens and adds nothing. 0 where every token is certain
    of its modality's one expert; with n of them (n - 1) / E is the least, since p sums to one and m does not.
    """
    label_T = _modalities(ctx, "modality_l1")
    probs_VE = distributions(routing, ctx)
    meant_VE = experts_ME.to(label_T.device)[label_T[valid_tokens(routing, ctx)]]
    off_V = (probs_VE - meant_VE.to(probs_VE)).abs().mean(-1) * meant_VE.any(-1)
    return off_V.sum() / max(len(off_V), 1)


def modality_kl(routing: Routing, ctx: Context | None = None, *, released: bool = False) -> Tensor:
    """Return 1 - the mean over pairs a < b of modalities of KL(P_b || P_a): Uni-MoE's second loss (arXiv 2405.11273).

    P is the mean probability of a modality's tokens in the batch. 1 where modalities choose alike, and less the further
    apart they are: to lower it is to tell them apart. 0 where fewer than two modalities have tokens.

    ``released`` is what the code computes: softmax of P once more, so that no two can be far apart, and the divergence
    over E. It also takes each sequence on its own, and of four modalities leaves the pair of image and video out.
    """
    group_T, tokens_G = groups(routing, ctx, _modalities(ctx, "modality_kl"))
    mean_GE = mean_probabilities(routing, ctx, group_T, tokens_G)
    first_P, second_P = torch.triu_indices(len(mean_GE), len(mean_GE), 1, device=mean_GE.device)
    if len(first_P) == 0:
        return mean_GE.sum() * 0
    if released:
        mean_GE = mean_GE.softmax(-1)
    log_GE = mean_GE.clamp(min=torch.finfo(mean_GE.dtype).tiny).log()
    apart_P = (mean_GE[second_P] * (log_GE[second_P] - log_GE[first_P])).sum(-1)
    return 1 - apart_P.mean() / (routing.num_experts if released else 1)


def _modalities(ctx: Context | None, loss: str) -> Tensor:
    if ctx is None or ctx.modality_T is None:
        raise ValueError(f"loss '{loss}' needs modality_T in the Context; give the modality of every token.")
    return ctx.modality_T

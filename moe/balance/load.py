"""Losses of even load, which know their best value (1 for the Switch family, 0 for the variations), and of scores.

Where the shares of the load and of the probability are the same, ``switch`` is ``1 + cv2``: so both families, and
systems with another k or another number of experts, stand on one scale. Shape letters: T tokens, V valid tokens,
E expert ids, N assignments, G groups of tokens, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...contracts import OWNERS
from ..routing import Context, Routing
from .rows import distributions, given, groups, valid_tokens


def switch(
    routing: Routing,
    ctx: Context | None = None,
    *,
    eta_E: Tensor | None = None,
    bucket: Sequence[int] = (),
    slots: int | None = None,
    first_only: bool = False,
) -> Tensor:
    """Return sum_e(1 / eta_e) * sum_e eta_e f_e P_e, with sum f = sum P = 1: 1 at the optimum, whatever E, k and eta.

    f_e is the share of the load and P_e the mean probability of expert e; without ``eta_E`` this is E * sum_e f_e P_e
    (Fedus et al. 2021), which is E where one expert has everything.

    ``eta_E`` makes the optimum P_e proportional to 1 / eta_e (MoE++, arXiv 2410.07348). ``bucket`` are ids of null
    experts, which need no balance among themselves: each counts with their mean load (AdaMoE, EMNLP 2024; its released
    code for Mixtral takes that mean along an axis where it changes nothing, and is not followed). ``slots`` reads f
    from the so many most probable experts instead of from the entries, for routers that leave out the entries of null
    experts; ``first_only`` is one slot, as GShard has it: then a token dropped by a capacity counts as well.

    What systems add is this times a factor: Switch, GShard, EvoMoE and DiT-MoE 1; transformers (Mixtral, OLMoE,
    Qwen3-MoE) and AdaMoE k, as their f sums to k; MoE++ k / sum(1 / eta); AdaMoE-VLA 1 / E^2.
    """
    group_T, tokens_G = groups(routing, ctx, None)
    share_GE = _shares(routing, ctx, group_T, len(tokens_G), 1 if first_only else slots)
    if bucket:
        chosen = list(bucket)
        share_GE[:, chosen] = share_GE[:, chosen].mean(1, keepdim=True)
    product_GE = share_GE * mean_probabilities(routing, ctx, group_T, tokens_G)
    if eta_E is None:
        return routing.num_experts * product_GE.sum()
    return (1 / eta_E).sum() * (eta_E * product_GE).sum()


def modality(routing: Routing, ctx: Context | None = None, *, visible_ME: Tensor | None = None) -> Tensor:
    """Return the mean over modalities of ``switch`` of their own tokens over the experts that they see.

    ``ctx.modality_T`` numbers the modalities; ``visible_ME`` is bool, None where all see all experts. A modality
    without tokens is left out. MoIIE adds the sum over its two modalities: twice as much.
    """
    if ctx is None or ctx.modality_T is None:
        raise ValueError("loss 'modality' needs modality_T in the Context; give the modality of every token.")
    label_T = ctx.modality_T
    product_GE = _products(routing, ctx, label_T)
    if visible_ME is None:
        return routing.num_experts * _mean(product_GE.sum(-1))
    visible_GE = visible_ME[torch.unique(label_T[valid_tokens(routing, ctx)])]
    return _mean(visible_GE.sum(-1) * (product_GE * visible_GE).sum(-1))


def sequence(routing: Routing, ctx: Context | None = None) -> Tensor:
    """Return the mean over the segments of ``ctx`` of ``switch`` within each (DeepSeek-V3, arXiv 2412.19437).

    Without segments all tokens are one. DeepSeek-V3 counts f over k choices divided by k, so that the factor is 1.
    """
    label_T = None if ctx is None else ctx.segment_T
    return routing.num_experts * _mean(_products(routing, ctx, label_T).sum(-1))


def cv2_importance(routing: Routing, ctx: Context | None = None) -> Tensor:
    """Return the squared coefficient of variation of the sums of weights (Shazeer et al. 2017), 0 to E - 1.

    The variance is the population's, so that the largest value is E - 1; released code divides by E - 1 in place of E.
    """
    return _cv2(routing.weight_N.new_zeros(routing.num_experts).index_add(0, routing.expert_N, routing.weight_N))


def cv2_load(routing: Routing, ctx: Context | None = None, *, k: int | None = None, noise: float = 0.0) -> Tensor:
    """Return the squared coefficient of variation of the loads (Shazeer et al. 2017), 0 to E - 1.

    Without ``noise`` loads are counts and have no gradient. With it the load of an expert is the expected number of
    tokens that keep it among their ``k`` best once N(0, noise^2) is added to its logit (M3ViT, arXiv 2210.14793:
    noise = noise_std / E). The others' logits are taken as they stand in the Routing.
    """
    if noise == 0.0:
        return _cv2(routing.counts_E.float())
    logits_VE = given(routing.logits_TE, "logits_TE").float()[valid_tokens(routing, ctx)]
    if k is None or not 0 < k < routing.num_experts:
        raise ValueError(f"a smooth load needs k between 1 and {routing.num_experts - 1}, not {k}; give k.")
    best_VK = logits_VE.topk(k + 1, dim=-1).values
    threshold_VE = torch.where(logits_VE >= best_VK[:, k - 1 : k], best_VK[:, k:], best_VK[:, k - 1 : k])
    return _cv2(torch.special.ndtr((logits_VE - threshold_VE) / noise).sum(0))


def entropy(routing: Routing, ctx: Context | None = None) -> Tensor:
    """Return the mean entropy of a token's probabilities over ln E: 0 where it is certain, 1 where it knows nothing.

    Top-p routers add it so that few experts hold the share p (Huang et al. 2024, arXiv 2403.07652).
    """
    probs_VE = distributions(routing, ctx)
    log_VE = probs_VE.clamp(min=torch.finfo(probs_VE.dtype).tiny).log()
    return -(probs_VE * log_VE).sum() / (max(len(probs_VE), 1) * math.log(max(routing.num_experts, 2)))


def z_loss(routing: Routing, ctx: Context | None = None) -> Tensor:
    """Return mean_t logsumexp(z_t)^2, which keeps logits small (ST-MoE, arXiv 2202.08906)."""
    logits_VE = given(routing.logits_TE, "logits_TE")[valid_tokens(routing, ctx)]
    return torch.logsumexp(logits_VE.float(), dim=-1).square().sum() / max(len(logits_VE), 1)


def eta(kinds: Sequence[str], tau: float) -> Tensor:
    """Return eta_E float32 of MoE++, for ``switch``: 1 for experts that own weights, ``tau`` for the others."""
    return torch.tensor([1.0 if kind in OWNERS else tau for kind in kinds])


def _products(routing: Routing, ctx: Context | None, label_T: Tensor | None) -> Tensor:
    """Return f_e P_e within each group, [G, E]."""
    group_T, tokens_G = groups(routing, ctx, label_T)
    share_GE = _shares(routing, ctx, group_T, len(tokens_G), None)
    return share_GE * mean_probabilities(routing, ctx, group_T, tokens_G)


def _shares(routing: Routing, ctx: Context | None, group_T: Tensor, count: int, slots: int | None) -> Tensor:
    """Return f_GE float32, each row summing to one (to zero where a group has no entries)."""
    if slots is None:
        group_N, expert_N = group_T[routing.token_N], routing.expert_N
    else:
        best_VK = distributions(routing, ctx).detach().topk(slots, dim=-1).indices
        group_N, expert_N = group_T[group_T >= 0].repeat_interleave(slots), best_VK.flatten()
    cell_N = (group_N * routing.num_experts + expert_N)[group_N >= 0]
    counts_GE = torch.bincount(cell_N, minlength=count * routing.num_experts).reshape(count, routing.num_experts)
    return counts_GE / counts_GE.sum(-1, keepdim=True).clamp(min=1)


def mean_probabilities(routing: Routing, ctx: Context | None, group_T: Tensor, tokens_G: Tensor) -> Tensor:
    """Return P_GE, the mean probabilities of the valid tokens of each group."""
    probs_VE = distributions(routing, ctx)
    sum_GE = probs_VE.new_zeros(len(tokens_G), routing.num_experts).index_add(0, group_T[group_T >= 0], probs_VE)
    return sum_GE / tokens_G[:, None]


def _cv2(value_E: Tensor) -> Tensor:
    """Return variance over squared mean; 0 where all are 0."""
    return value_E.var(correction=0) / value_E.mean().square().clamp(min=torch.finfo(value_E.dtype).tiny)


def _mean(value_G: Tensor) -> Tensor:
    """Return the mean, 0 where there are no groups: a batch of padding alone."""
    return value_G.sum() / max(len(value_G), 1)

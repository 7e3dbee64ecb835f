"""A quantized router that is calibrated to keep its choices (EAQuant's router alignment).

Minimised is L = mean_t |z - z'|^2 + KL(softmax of the top-k of z || softmax of z' at the same experts), z the router's
logits and z' those of the quantized one, over the scale of each row and the rounding of each code, by a search that
begins at rounding to nearest and only takes what lowers L and chooses no fewer of the same experts. So it is never
worse than rounding to nearest on the calibration tokens, in either respect.

Shape letters: T tokens, H hidden, E experts, K slots, C candidates of one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Scheme
from ..codecs.integer import IntTensor
from ..codecs.packing import pack_codes
from ..codecs.rtn import round_to_nearest

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Scales tried, as parts of the scale that clips nothing."""

ROUNDS = 2
"""How often every code, and then every row, is looked at again."""


@dataclass(frozen=True, eq=False)
class Aligned:
    """A quantized router, and on the calibration tokens: L and top-k agreement, of rounding to nearest and of it."""

    weight: IntTensor
    loss_before: float
    loss: float
    agreement_before: float
    agreement: float


def alignment_loss(logits_TE: Tensor, other_TE: Tensor, k: int) -> Tensor:
    """Return L as a scalar: a mean over tokens, natural logarithms."""
    top_TK = logits_TE.topk(k, dim=-1).indices
    log_p_TK = logits_TE.gather(1, top_TK).log_softmax(-1)
    log_q_TK = other_TE.gather(1, top_TK).log_softmax(-1)
    kl_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(-1)
    return ((logits_TE - other_TE).square().sum(-1) + kl_T).mean()


def topk_agreement(logits_TE: Tensor, other_TE: Tensor, k: int) -> float:
    """Return the mean share of a token's ``k`` best experts that are among its ``k`` best of the other logits."""
    kept = [torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(k).indices, True) for z in (logits_TE, other_TE)]
    return float((kept[0] & kept[1]).sum()) / (k * len(logits_TE))


def aligned_router(router_EH: Tensor, x_TH: Tensor, k: int, scheme: Scheme) -> Aligned:
    """Return the router quantized under ``scheme`` (symmetric, one scale per row) and aligned on ``x_TH``."""
    if len(x_TH) == 0:
        raise ValueError("the router is aligned on tokens and got none; ask for calibration tokens.")
    if not scheme.symmetric or scheme.group is not None:
        raise ValueError("a router is aligned with one scale per expert and no offsets; use a symmetric scheme.")
    if not 0 < k <= len(router_EH):
        raise ValueError(f"k={k} must lie between 1 and the router's {len(router_EH)} experts.")
    nearest = round_to_nearest(router_EH, scheme)
    x_TH, weight_EH = x_TH.double(), router_EH.double()
    target_TE = x_TH @ weight_EH.T
    scales_CE, codes_CEH = _candidates(weight_EH, x_TH, nearest)
    logits_CTE = torch.einsum("ceh,th->cte", codes_CEH * scales_CE.double()[:, :, None], x_TH)
    chosen_E = _chosen(target_TE, logits_CTE, k)
    rows = torch.arange(len(weight_EH))
    weight = _packed(codes_CEH[chosen_E, rows], scales_CE[chosen_E, rows], nearest)
    before_TE = logits_CTE[0]
    found_TE = x_TH @ weight.dequantize(torch.float64).T
    return Aligned(
        weight,
        float(alignment_loss(target_TE, before_TE, k)),
        float(alignment_loss(target_TE, found_TE, k)),
        topk_agreement(target_TE, before_TE, k),
        topk_agreement(target_TE, found_TE, k),
    )


def _candidates(weight_EH: Tensor, x_TH: Tensor, nearest: IntTensor) -> tuple[Tensor, Tensor]:
    """Return scales_CE as stored and codes_CEH float64 of all candidates; the first is rounding to nearest."""
    top = 2 ** (int(nearest.scheme.bits) - 1)
    scales_CE = torch.stack([(nearest.scales[:, 0].float() * clip).to(nearest.scales.dtype) for clip in CLIPS])
    step_CE1 = scales_CE.double()[:, :, None]
    step_CE1 = torch.where(step_CE1 > 0, step_CE1, torch.ones_like(step_CE1))
    codes_CEH = (weight_EH / step_CE1).round().clamp(-top, top - 1)
    codes_CEH[0] = nearest.unpack().double() - nearest.offset
    moved_CEH = _descended(weight_EH, codes_CEH, step_CE1, x_TH.T @ x_TH, top)
    return torch.cat([scales_CE, scales_CE]), torch.cat([codes_CEH, moved_CEH])


def _descended(weight_EH: Tensor, codes_CEH: Tensor, step_CE1: Tensor, gram_HH: Tensor, top: int) -> Tensor:
    """Return codes after ROUNDS of setting each to what makes |z - z'|^2 least with all others as they are."""
    codes_CEH = codes_CEH.clone()
    error_CEH = weight_EH - codes_CEH * step_CE1
    step_CE = step_CE1[:, :, 0]
    for channel in torch.arange(len(gram_HH)).repeat(ROUNDS).tolist():
        power = gram_HH[channel, channel]
        if power <= 0:
            continue
        others_CE = error_CEH @ (gram_HH[channel] / power) - error_CEH[:, :, channel]
        wanted_CE = weight_EH[:, channel] + others_CE
        codes_CEH[:, :, channel] = (wanted_CE / step_CE).round().clamp(-top, top - 1)
        error_CEH[:, :, channel] = weight_EH[:, channel] - codes_CEH[:, :, channel] * step_CE
    return codes_CEH


def _chosen(target_TE: Tensor, logits_CTE: Tensor, k: int) -> Tensor:
    """Return the candidate of each row, [E] int64, by descent from candidate 0 over one row at a time."""
    now_TE = logits_CTE[0].clone()
    chosen_E = torch.zeros(target_TE.shape[1], dtype=torch.long)
    best, agreed = float(alignment_loss(target_TE, now_TE, k)), topk_agreement(target_TE, now_TE, k)
    for row in list(range(len(chosen_E))) * ROUNDS:
        for candidate in range(len(logits_CTE)):
            tried_TE = now_TE.clone()
            tried_TE[:, row] = logits_CTE[candidate, :, row]
            loss = float(alignment_loss(target_TE, tried_TE, k))
            if loss < best and topk_agreement(target_TE, tried_TE, k) >= agreed:
                best, now_TE, chosen_E[row] = loss, tried_TE, candidate
    return chosen_E


def _packed(codes_EH: Tensor, scales_E: Tensor, like: IntTensor) -> IntTensor:
    bits = int(like.scheme.bits)
    stored = codes_EH.to(torch.int8) if bits == 8 else pack_codes(codes_EH + 2 ** (bits - 1), bits)
    return IntTensor(stored, scales_E[:, None].contiguous(), None, like.scheme, like.shape)

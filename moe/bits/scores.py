"""Scores of QuantMoE-Bench (arXiv 2406.08155): outliers of a weight matrix, and how much a block turns its input.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts import ExpertStore


def outlier_score(weight: Tensor) -> float:
    """Return max_j (max_i |W_ij| / mean_i |W_ij|) of ``weight`` [out, in]; a column of zeros has no outlier."""
    absolute = weight.float().abs()
    mean_I = absolute.mean(dim=0)
    ratio_I = absolute.amax(dim=0) / torch.where(mean_I > 0, mean_I, torch.ones_like(mean_I))
    return float(ratio_I.max())


def expert_outlier_scores(store: ExpertStore) -> tuple[float, ...]:
    """Return the highest outlier score of the linear maps (gate, up, down) of each expert that owns weights."""
    scores = []
    for slot in range(len(store.ffn_ids)):
        gate_up, down = store.weights(slot)
        maps = (*gate_up.chunk(2), down) if store.gated else (gate_up, down)
        scores.append(max(outlier_score(weight) for weight in maps))
    return tuple(scores)


def block_cosine(in_TH: Tensor, out_TH: Tensor) -> float:
    """Return the mean over tokens of cos(x_in, x_out) of a block; the lower, the more the block matters."""
    return float(token_cosines(in_TH, out_TH).mean())


def token_cosines(in_TH: Tensor, out_TH: Tensor) -> Tensor:
    """Return cos(x_in, x_out) of each token, [T] float32; 0 where either is zero."""
    cosines_T: Tensor = torch.cosine_similarity(in_TH.float(), out_TH.float(), dim=-1)
    return cosines_T

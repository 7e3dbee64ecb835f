"""How far a model's next-token distribution lies from the text and from the dense model's, token by token.

Shape letters: T tokens, V vocabulary, C columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...contracts import Metric
from .bootstrap import metric_of
from .calibration import calibration_error

ROWS = 64
"""Tokens whose distributions are held in float64 at once: 25 MB for a vocabulary of 49 152."""

COLUMNS = ("nll", "dense_nll", "kl", "agree", "confidence", "right", "bytes", "tokens")
"""What is known of each predicted token: natural logarithms, the likeliest token's probability and whether it was
right, and what sums are divided by."""


@torch.no_grad()
def score(head: Any, final_TH: Tensor, dense_TH: Tensor, next_T: Tensor, bytes_T: Tensor) -> Tensor:
    """Return COLUMNS of each token, float64 [T, C].

    ``final_TH`` and ``dense_TH`` are what ``head`` reads in the changed and in the dense model, ``next_T`` the tokens
    to predict. KL is sum_v p log(p / q), p dense and q changed; equal states give exactly 0 and agreement 1.
    """
    parts = []
    for mine_TH, dense_RH, next_R in zip(*(torch.split(t, ROWS) for t in (final_TH, dense_TH, next_T)), strict=True):
        logq_RV = head(mine_TH).double().log_softmax(-1)
        logp_RV = head(dense_RH).double().log_softmax(-1)
        kl_R = (logp_RV.exp() * (logp_RV - logq_RV)).sum(-1)
        best_R = logq_RV.max(-1)
        agree_R = (best_R.indices == logp_RV.argmax(-1)).double()
        right_R = (best_R.indices == next_R).double()
        nll = [-log_RV.gather(1, next_R[:, None])[:, 0] for log_RV in (logq_RV, logp_RV)]
        parts.append(torch.stack([*nll, kl_R, agree_R, best_R.values.exp(), right_R], dim=1))
    return torch.cat([torch.cat(parts), torch.stack([bytes_T, torch.ones_like(bytes_T)], dim=1)], dim=1)


def _mean(column: str, per: str = "tokens") -> Any:
    above, below = COLUMNS.index(column), COLUMNS.index(per)
    return lambda sums: sums[..., above] / sums[..., below]


STATISTICS: dict[str, tuple[str, Any]] = {
    "perplexity": ("1", lambda sums: _mean("nll")(sums).exp()),
    "bits_per_byte": ("bit/byte", lambda sums: _mean("nll", "bytes")(sums) / math.log(2)),
    "kl_to_dense": ("nat/token", _mean("kl")),
    "top1_agreement": ("1", _mean("agree")),
    "next_token_accuracy": ("1", _mean("right")),
    "dense_perplexity": ("1", lambda sums: _mean("dense_nll")(sums).exp()),
}
"""The unit of each figure, and how it follows from sums of the columns."""


def quality_metrics(scores_TC: Tensor, seed: int) -> list[Metric]:
    """Return every figure of STATISTICS and the calibration error, each with its interval.

    ``n`` is the number of predicted tokens.
    """
    found = [metric_of(name, unit, scores_TC, statistic, seed) for name, (unit, statistic) in STATISTICS.items()]
    confidence_T, right_T = (scores_TC[:, COLUMNS.index(column)] for column in ("confidence", "right"))
    return [*found, calibration_error(confidence_T, right_T, seed)]

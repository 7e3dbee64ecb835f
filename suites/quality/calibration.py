"""Does a model know how sure it may be? The expected calibration error of next-token predictions.

Shape letters: T tokens, B bins, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Metric
from .bootstrap import metric_of

BINS = 15


def calibration_error(confidence_T: Tensor, right_T: Tensor, seed: int, bins: int = BINS) -> Metric:
    """Return ``ece`` with its interval: sum over bins of |sum of confidences - number right| / T.

    ``confidence_T`` is the likeliest token's probability, ``right_T`` 1 where that token came. Bins have equal mass
    (Nguyen & O'Connor, EMNLP 2015; Nixon et al., arXiv 1904.01685): tokens in the order of their confidence, those
    of one confidence in one bin. A resample keeps the bins. Noise within a bin counts as error, so that the figure, and
    more so its interval, lies above 0 for a model that is calibrated: compare figures of as many tokens alone.
    """
    gaps_TB = bin_gaps(confidence_T, right_T, bins)
    columns_TC = torch.cat([gaps_TB, torch.ones_like(confidence_T)[:, None]], dim=1)
    return metric_of("ece", "1", columns_TC, lambda sums: sums[..., :-1].abs().sum(-1) / sums[..., -1], seed)


def bin_gaps(confidence_T: Tensor, right_T: Tensor, bins: int = BINS) -> Tensor:
    """Return confidence - right in the column of each token's bin and 0 in the others, [T, B] float64."""
    bin_T = equal_mass_bins(confidence_T, bins)
    gaps_TB = torch.zeros(len(confidence_T), bins, dtype=torch.float64)
    return gaps_TB.scatter(1, bin_T[:, None], (confidence_T.double() - right_T.double())[:, None])


def equal_mass_bins(values_T: Tensor, bins: int) -> Tensor:
    """Return the bin of each token, [T] int64: the rank of its value among all, in ``bins`` equal parts.

    Equal values have the lowest rank of them all, and so one bin.
    """
    order_T = values_T.sort().values
    rank_T = torch.searchsorted(order_T, values_T.contiguous(), right=False)
    return rank_T * bins // max(1, len(values_T))

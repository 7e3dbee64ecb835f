"""Which inputs the projections of attention leave out: the family's rules at linear maps that are no expert's.

Shape letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ..channels import LowRank, SiteRule
from ..sparsity import quantile
from .channel import best_of_rank, exact_in_bfloat16, spare_rank
from .params import ChannelParams


def projection_rule(params: ChannelParams, name: str, weight_OI: Tensor, x_TI: Tensor) -> SiteRule | None:
    """Return the rule by which projection ``name`` leaves out ``level`` of its inputs; None where it leaves out none.

    ``x_TI`` float32 is what it reads in calibration, of which a threshold is taken. Scores are |x_j|, or |x_j| times
    the norm of column j of ``weight_OI``.
    """
    outputs, width = weight_OI.shape
    normed = params.attention_scores[name] == "column_norm"
    weight_I = exact_in_bfloat16(weight_OI.double().norm(dim=0)) if normed else None
    used = (1.0 - params.level) * params.alpha
    rule = SiteRule(k=math.floor(width * used + 1e-9), weight=weight_I)
    if params.rule == "threshold":
        every = SiteRule(0.0, weight=weight_I)
        threshold = quantile([every.score(x_TI)], 1.0 - used)
        if threshold is None:
            return None
        rule = replace(every, threshold=threshold)
    if rule.k == width:
        return None
    rank = spare_rank(outputs, width, params.level, params.alpha)
    if rank == 0:
        return rule
    left_OR, right_RI = best_of_rank(weight_OI.double(), rank)
    return replace(rule, residual=LowRank(left_OR.float()[None], right_RI.float()[None]))

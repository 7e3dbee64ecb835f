"""Intervals of figures over text: a seeded block bootstrap.

It is here, in torch, because suites may not import ``results``; neighbouring tokens are correlated, so blocks of them
are drawn (Kuensch 1989). Shape letters: T tokens, B blocks, C columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...contracts import Metric

BLOCK = 32
"""Tokens per block: dependence between tokens reaches little further than a sentence."""

LEAST_BLOCKS = 6
"""Fewer blocks give a value without bounds."""

RESAMPLES = 2000
LEVEL = 0.95


def block_sums(columns_TC: Tensor, block: int = BLOCK) -> Tensor:
    """Return the sums of each column over blocks of ``block`` tokens, [B, C]; a last block may be shorter."""
    return torch.stack([part_TC.sum(0) for part_TC in torch.split(columns_TC, block)])


def interval(
    sums_BC: Tensor, statistic: Callable[[Tensor], Tensor], seed: int
) -> tuple[float, float | None, float | None]:
    """Return (value, lo, hi) of ``statistic``, which takes sums [.., C] and returns [..], at 95 %."""
    value = float(statistic(sums_BC.sum(0)))
    blocks = len(sums_BC)
    if blocks < LEAST_BLOCKS:
        return value, None, None
    rng = torch.Generator().manual_seed(seed)
    drawn_RB = torch.randint(blocks, (RESAMPLES, blocks), generator=rng)
    counts_RB = torch.zeros(RESAMPLES, blocks, dtype=sums_BC.dtype)
    counts_RB.scatter_add_(1, drawn_RB, torch.ones_like(drawn_RB, dtype=sums_BC.dtype))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=sums_BC.dtype)
    lo, hi = torch.quantile(statistic(counts_RB @ sums_BC), tails).tolist()
    return value, lo, hi


def metric_of(name: str, unit: str, columns_TC: Tensor, statistic: Callable[[Tensor], Tensor], seed: int) -> Metric:
    """Return the Metric of ``statistic`` over tokens, with its interval and the number of tokens."""
    value, lo, hi = interval(block_sums(columns_TC), statistic, seed)
    return Metric(name, value, unit, lo, hi, len(columns_TC))

"""Intervals of figures over text: a seeded block bootstrap.

It is here, in torch, because suites may not import ``results``; neighbouring tokens are correlated, so blocks of them
are drawn (Kuensch 1989), and percentiles are taken as much wider as few blocks ask for (Hesterberg 2015, "expanded
percentile"). Shape letters: T tokens, B blocks, C columns, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

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
    tail = NormalDist().cdf(-_width(blocks))
    tails = torch.tensor([tail, 1 - tail], dtype=sums_BC.dtype)
    lo, hi = torch.quantile(statistic(counts_RB @ sums_BC), tails).tolist()
    return value, lo, hi


def _width(blocks: int) -> float:
    """Return the half width of an interval in standard errors.

    Student's t by its expansion in 1 / freedom (Abramowitz & Stegun 26.7.5; within 0.2 % from 5 on), times what the
    plain variance of so few blocks loses.
    """
    z, n = NormalDist().inv_cdf((1 + LEVEL) / 2), blocks - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    student = math.fsum([z, *(term / n**power for power, term in enumerate(terms, 1))])
    return student * math.sqrt(blocks / n)


def metric_of(name: str, unit: str, columns_TC: Tensor, statistic: Callable[[Tensor], Tensor], seed: int) -> Metric:
    """Return the Metric of ``statistic`` over tokens, with its interval and the number of tokens."""
    value, lo, hi = interval(block_sums(columns_TC), statistic, seed)
    return Metric(name, value, unit, lo, hi, len(columns_TC))

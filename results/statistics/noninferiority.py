"""Is the candidate at most a margin worse, on the same items?"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Interval, floats
from .bootstrap import LEAST_UNITS, bootstrap_interval
from .student import student_quantile


def paired_difference(base: ArrayLike, candidate: ArrayLike, level: float = 0.95) -> Interval:
    """Return the mean of candidate - base over the same items and its interval; higher means better.

    Student's t over the differences, with two items added that differ by the largest difference either way: for right
    and wrong answers this is the adjusted Wald interval of Bonett & Price (2012), which keeps its level where few items
    differ, or none. Fewer than 10 items give no bounds; not claimed for a few dozen differences that are strongly
    skewed (90.5 % for 20 lognormal ones).
    """
    base_N, candidate_N = floats(base), floats(candidate)
    if len(base_N) != len(candidate_N):
        raise ValueError(f"paired items must be as many on both sides, not {len(base_N)} and {len(candidate_N)}.")
    n = len(base_N)
    if n == 0:
        return Interval(None, None, None, 0, LEAST_UNITS)
    differences = candidate_N - base_N
    value = float(differences.mean())
    if n < LEAST_UNITS:
        return Interval(value, None, None, n, LEAST_UNITS)
    largest = float(np.abs(differences).max()) or float(np.ptp(np.concatenate([base_N, candidate_N])))
    padded = np.concatenate([differences, [largest, -largest]])
    half = student_quantile(n - 1, level) * float(padded.std(ddof=1)) / math.sqrt(n + 2)
    centre = float(padded.mean())
    return Interval(value, centre - half, centre + half, n, LEAST_UNITS)


NEIGHBOURS = 5
"""Items that stay together in a resample where there are enough: neighbours in a text share words and subject."""


def paired_block_difference(base: ArrayLike, candidate: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of candidate - base over the same items, in their order, and its paired block bootstrap interval.

    Each resample draws the pairs of ``NEIGHBOURS`` consecutive items together, or single pairs where fewer than 10
    blocks were left. Fewer than 10 items give no bounds. Of strongly skewed differences the level is not claimed
    (``bootstrap_interval``): it is that of means.
    """
    base_N, candidate_N = floats(base), floats(candidate)
    if len(base_N) != len(candidate_N):
        raise ValueError(f"paired items must be as many on both sides, not {len(base_N)} and {len(candidate_N)}.")
    block = NEIGHBOURS if len(base_N) >= LEAST_UNITS * NEIGHBOURS else 1
    found = bootstrap_interval(candidate_N - base_N, np.mean, level, seed=seed, block=block)
    return Interval(found.value, found.lo, found.hi, found.n, LEAST_UNITS)


def mcnemar_p(base: ArrayLike, candidate: ArrayLike) -> float:
    """Return the two-sided exact p value that right answers went either way alike (McNemar; answers are 0 or 1)."""
    differences = floats(candidate) - floats(base)
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    n, fewer = won + lost, min(won, lost)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / (1 << n)
    return min(1.0, 2 * tail)

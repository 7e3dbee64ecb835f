"""Pairs taken together, in several process pairs: an effect with the variance within and between them.

The rule was measured beside others under four kinds of load; what is claimed for it holds for log-ratios of turns that
were taken in turns, whose neighbours are hardly correlated. Every log-ratio is log(candidate) - log(base).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, floats
from .order import correlated_median_interval

NORMAL = NormalDist()

LEAST_PAIRS_FOR_TAU = 3

LEAST_FOR_MEDIAN = 3
"""The median of one or two pairs is their mean."""


@dataclass(frozen=True)
class Ratio:
    """A ratio with its interval; ``lo`` and ``hi`` are None where too few pairs bear one."""

    ratio: float
    lo: float | None
    hi: float | None
    n: int


@dataclass(frozen=True)
class Tau:
    """Standard deviation of the log-ratio between process pairs of equal code.

    ``value`` is at least the floor; ``measured`` is None for fewer than 3 pairs.
    """

    value: float
    measured: float | None
    pairs: int


@dataclass(frozen=True)
class Effect:
    """A log-ratio with its standard error ``se``; ``se_within`` leaves out what process pairs differ by."""

    log_ratio: float
    se: float
    se_within: float
    pairs: int
    turns: int

    def interval(self, z: float) -> tuple[float, float]:
        """Return the bounds of the ratio, ``z`` standard errors from the estimate."""
        return math.exp(self.log_ratio - z * self.se), math.exp(self.log_ratio + z * self.se)

    def p_above(self, log_threshold: float) -> float:
        """Return the one-sided p value against an effect of ``log_threshold`` or less."""
        if self.se == 0.0:
            return float(self.log_ratio <= log_threshold)
        return NORMAL.cdf((log_threshold - self.log_ratio) / self.se)


def paired_log_ratio(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Ratio:
    """Return the ratio a / b as exp(median(log(a_i / b_i))) over pairs taken together, with its interval.

    Above 1 means that a took longer. The interval is ``correlated_median_interval`` of the log-ratios: it holds for one
    process pair, and says nothing of how much process pairs differ (see ``paired_effect``).
    """
    a_N, b_N = floats(a), floats(b)
    if len(a_N) != len(b_N) or len(a_N) == 0:
        raise ValueError(f"pairs need as many of one as of the other and at least one, not {len(a_N)} and {len(b_N)}.")
    if a_N.min() <= 0 or b_N.min() <= 0:
        raise ValueError("ratios need positive numbers; a time of 0 is no measurement.")
    found = correlated_median_interval(np.log(a_N) - np.log(b_N), level)
    lo, hi = (None if bound is None else math.exp(bound) for bound in (found.lo, found.hi))
    return Ratio(math.exp(found.value or 0.0), lo, hi, len(a_N))


def median_se(x: ArrayLike) -> float:
    """Return the standard error of the median: half the width of its interval at the level of one standard error.

    Infinite where there are too few samples to have an interval (4 independent ones).
    """
    values = floats(x)
    found = correlated_median_interval(values, 2 * NORMAL.cdf(1.0) - 1) if len(values) else None
    if found is None or found.lo is None or found.hi is None:
        return math.inf
    return (found.hi - found.lo) / 2


def paired_effect(log_ratios: Sequence[ArrayLike], tau: float) -> Effect:
    """Return the effect over process pairs, one array of turn log-ratios each; at least one must have turns.

    The estimate is the median of all turns in which each process pair has the same weight: one pair in five that is far
    off does not carry it away, as it would a mean. Its variance is that of the pairs' medians, mean over pairs, plus
    tau^2, divided by the number of pairs (Kalibera & Jones, arXiv 2007.10899: repetition has levels).
    """
    pairs = [floats(one) for one in log_ratios if len(np.atleast_1d(np.asarray(one)))]
    if not pairs:
        raise ValueError("an effect needs a process pair with turns.")
    within = math.sqrt(sum(median_se(one) ** 2 for one in pairs)) / len(pairs)
    se = math.hypot(within, math.sqrt(_median_factor(pairs, tau) / len(pairs)) * tau)
    return Effect(_balanced_median(pairs), se, within, len(pairs), sum(map(len, pairs)))


def _median_factor(pairs: Sequence[Floats], tau: float) -> float:
    """Return what a median loses against a mean over process pairs: from 1 to pi / 2, where turns hardly differ.

    Signs of two turns of one pair correlate by 2 / pi asin(icc), with icc the share of tau^2 in the variance of a turn.
    """
    if len(pairs) < LEAST_FOR_MEDIAN:
        return 1.0
    spread = float(np.median([1.4826 * np.median(np.abs(one - np.median(one))) for one in pairs]))
    icc = tau**2 / (tau**2 + spread**2) if tau > 0 else 0.0
    return math.asin(icc) / icc if icc > 0 else 1.0


def _balanced_median(pairs: Sequence[Floats]) -> float:
    """Return the median over all values where each array weighs the same; between two values, their mean."""
    values = np.concatenate(pairs)
    weights = np.concatenate([np.full(len(one), 1.0 / (len(one) * len(pairs))) for one in pairs])
    order = np.argsort(values, kind="stable")
    values, below = values[order], np.cumsum(weights[order])
    first = int(np.searchsorted(below, 0.5 - 1e-9))
    last = int(np.searchsorted(below, 0.5 + 1e-9))
    return float((values[first] + values[min(last, len(values) - 1)]) / 2)


def between_process_tau(log_ratios: Sequence[ArrayLike], floor: float = 0.015) -> Tau:
    """Return tau from the A/A log-ratios of several process pairs, of one case or of many.

    By moments: what the squares of the pairs' medians exceed their own variance by; the true ratio is 1. The floor
    stands for what few pairs cannot show: 0.5 % was found to be too small on a loaded machine.
    """
    medians = [float(np.median(floats(one))) for one in log_ratios]
    if len(medians) < LEAST_PAIRS_FOR_TAU:
        return Tau(floor, None, len(medians))
    excess = [median**2 - _finite(median_se(one)) ** 2 for median, one in zip(medians, log_ratios, strict=True)]
    measured = math.sqrt(max(0.0, sum(excess) / len(excess)))
    return Tau(max(floor, measured), measured, len(medians))


def _finite(se: float) -> float:
    """A pair of too few turns has no variance of its own to take off: all of its spread counts as tau's."""
    return se if math.isfinite(se) else 0.0


@lru_cache(maxsize=32)
def look_bound(looks: int, level: float = 0.95) -> float:
    """Return z such that ``looks`` looks at equal steps of information all stay within with chance ``level``.

    Pocock's bound (Biometrika 64, 1977): 1.960, 2.178, 2.289, ... by the recursion of Armitage, McPherson & Rowe
    (1969).
    """
    if looks < 1 or not 0 < level < 1:
        raise ValueError(f"looks are at least one and a level lies in (0, 1), not {looks} and {level}.")
    low, high = 0.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _stays_within(middle, looks) < level else (low, middle)
    return (low + high) / 2


def _stays_within(bound: float, looks: int) -> float:
    """Return the chance that |S_k| <= bound sqrt(k) for k = 1..looks, S a sum of unit normals, by Simpson's rule."""
    density, grid = np.array([1.0]), np.array([0.0])
    weights = np.array([1.0])
    for look in range(1, looks + 1):
        edge = bound * math.sqrt(look)
        new = np.linspace(-edge, edge, 201)
        kernel = np.exp(-((new[:, None] - grid) ** 2) / 2) / math.sqrt(2 * math.pi)
        density = kernel @ (density * weights)
        grid, weights = new, _simpson(len(new), 2 * edge)
    return float(density @ weights)


def _simpson(points: int, width: float) -> Floats:
    weights = np.ones(points)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return weights * width / (points - 1) / 3


def detectable_effect(se: float, z: float, margin: float, power: float = 0.8) -> float:
    """Return the smallest fraction whose estimate lies ``z`` standard errors above 1 + margin with chance ``power``."""
    return math.expm1(math.log1p(margin) + (z + NORMAL.inv_cdf(power)) * se)

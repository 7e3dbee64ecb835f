"""Arrays in, intervals out. Knows nothing of benchmarks.

Order-statistic intervals are exact for independent samples of any continuous distribution: the number of samples below
the q-quantile is binomial(n, q), so ranks are chosen by its tails (David & Nagaraja, Order Statistics, 7.1). Samples of
one process are often correlated (see ``lag1_autocorrelation``): then the interval is too narrow, and block bootstrap
over pairs or turns is the honest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

PERCENTILES = {"p90_ns": 0.90, "p95_ns": 0.95, "p99_ns": 0.99}


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. ``lo`` and ``hi`` are None where ``n`` is below ``n_required``."""

    value: float | None
    lo: float | None
    hi: float | None
    n: int
    n_required: int


@dataclass(frozen=True)
class Ratio:
    """A ratio with its interval; ``lo`` and ``hi`` are None where too few pairs bear one."""

    ratio: float
    lo: float | None
    hi: float | None
    n: int


def _floats(x: ArrayLike) -> Floats:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("statistics take one-dimensional arrays of finite numbers; drop what is missing first.")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Order statistics


@lru_cache(maxsize=256)
def _ranks(n: int, q: float, level: float) -> tuple[int, int] | None:
    """Return 0-based ranks of the interval with at most (1 - level) / 2 in each tail, or None where n is too small."""
    if n < 1:
        return None
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(k[1:]))])
    log_pmf = log_factorial[n] - log_factorial - log_factorial[::-1] + k * math.log(q) + (n - k) * math.log1p(-q)
    pmf = np.exp(log_pmf)
    tail = (1 - level) / 2 * (1 + 1e-12)
    below = int(np.searchsorted(np.cumsum(pmf), tail, side="right"))
    above = int(np.searchsorted(np.cumsum(pmf[::-1]), tail, side="right"))
    if below == 0 or above == 0:
        return None
    return below - 1, n - above


def quantile_n_required(q: float, level: float = 0.95) -> int:
    """Return the least n that gives the q-quantile a two-sided interval: 368 for p99, 6 for the median at 0.95."""
    if not 0 < q < 1 or not 0 < level < 1:
        raise ValueError(f"a quantile and a level lie strictly between 0 and 1, not {q} and {level}.")
    return math.ceil(math.log((1 - level) / 2) / math.log(max(q, 1 - q)) * (1 - 1e-12))


def quantile_interval(x: ArrayLike, q: float, level: float = 0.95) -> Interval:
    """Return the q-quantile (linear between order statistics) and its exact interval.

    Where n does not suffice for an interval the estimate is None too: a p99 of 100 samples is but their maximum.
    """
    values, required = np.sort(_floats(x)), quantile_n_required(q, level)
    ranks = _ranks(len(values), q, level)
    if ranks is None:
        return Interval(None, None, None, len(values), required)
    lo, hi = (float(values[rank]) for rank in ranks)
    return Interval(float(np.quantile(values, q)), lo, hi, len(values), required)


def median_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Return the median, and its exact interval where there are enough samples for one (6 at 0.95)."""
    interval = quantile_interval(x, 0.5, level)
    if interval.value is not None or interval.n == 0:
        return interval
    return Interval(float(np.median(_floats(x))), None, None, interval.n, interval.n_required)


def summary(ns: ArrayLike, level: float = 0.95) -> dict[str, Any]:
    """Return the summary columns of table ``timings`` for samples in nanoseconds; what n does not bear is None."""
    values = np.asarray(ns, dtype=np.int64)
    median = median_interval(values, level)
    return {
        "n": len(values),
        "min_ns": int(values.min()) if len(values) else None,
        "mean_ns": float(values.mean()) if len(values) else None,
        "median_ns": median.value,
        "median_lo_ns": median.lo,
        "median_hi_ns": median.hi,
        **{name: quantile_interval(values, q, level).value for name, q in PERCENTILES.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap


def _resampled(rng: np.random.Generator, n: int, block: int, resamples: int) -> NDArray[np.intp]:
    """Return ``resamples`` rows of n indices, drawn in circular blocks (Politis & Romano 1992)."""
    starts = rng.integers(0, n, size=(resamples, math.ceil(n / block)))
    return ((starts[:, :, None] + np.arange(block)) % n).reshape(resamples, -1)[:, :n]


def bootstrap_interval(
    x: ArrayLike,
    statistic: Callable[..., Any] = np.median,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    block: int = 1,
) -> Interval:
    """Return ``statistic`` of x and its percentile bootstrap interval; with ``block`` > 1 neighbours stay together.

    ``statistic`` takes an array and ``axis``. Fewer samples than the median's interval needs give no bounds.
    """
    values, required = _floats(x), quantile_n_required(0.5, level)
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0, required)
    value = float(statistic(values, axis=0))
    if n < required:
        return Interval(value, None, None, n, required)
    index = _resampled(np.random.default_rng(seed), n, min(max(block, 1), n), resamples)
    drawn = statistic(values[index], axis=1)
    lo, hi = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(lo), float(hi), n, required)


def paired_log_ratio(a: ArrayLike, b: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Ratio:
    """Return the ratio a / b as exp(median(log(a_i / b_i))) over pairs taken together, with a block bootstrap interval.

    Above 1 means that a took longer. Blocks have n^(1/3) pairs, at least, so that slow drifts stay inside them.
    """
    a_N, b_N = _floats(a), _floats(b)
    if len(a_N) != len(b_N) or len(a_N) == 0:
        raise ValueError(f"pairs need as many of one as of the other and at least one, not {len(a_N)} and {len(b_N)}.")
    if a_N.min() <= 0 or b_N.min() <= 0:
        raise ValueError("ratios need positive numbers; a time of 0 is no measurement.")
    logs = np.log(a_N) - np.log(b_N)
    found = bootstrap_interval(logs, np.median, level, resamples, seed, block=math.ceil(len(logs) ** (1 / 3)))
    bounds = [None if bound is None else math.exp(bound) for bound in (found.lo, found.hi)]
    return Ratio(math.exp(float(np.median(logs))), bounds[0], bounds[1], len(logs))


# ---------------------------------------------------------------------------------------------------------------------
# Series


def lag1_autocorrelation(x: ArrayLike) -> float | None:
    """Return the correlation of neighbours (biased estimator, in [-1, 1]); None for fewer than 3 or equal values."""
    values = _floats(x)
    centred = values - values.mean() if len(values) else values
    variance = float(centred @ centred)
    if len(values) < 3 or variance == 0:
        return None
    return float(centred[1:] @ centred[:-1]) / variance


def steady_start(turn_values: ArrayLike, window: int, tolerance: float) -> int | None:
    """Return the first index from which the medians of two windows in a row agree within ``tolerance`` (relative).

    None means that no such index exists (yet); two whole windows must follow the index.
    """
    values = _floats(turn_values)
    if window < 1 or tolerance < 0:
        raise ValueError(f"a window has at least one turn and a tolerance is not negative: {window}, {tolerance}.")
    if len(values) < 2 * window:
        return None
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
    first, second = medians[:-window], medians[window:]
    agree = np.abs(second - first) <= tolerance * np.minimum(np.abs(first), np.abs(second))
    return int(np.argmax(agree)) if agree.any() else None

"""Order statistics: quantiles with intervals that no distribution can spoil.

They are exact for independent samples of any continuous distribution: the number of samples below the q-quantile is
binomial(n, q), so ranks are chosen by its tails (David & Nagaraja, Order Statistics, 7.1). Samples of one process are
often correlated (see ``lag1_autocorrelation``): then ``correlated_median_interval`` is the honest one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Interval, floats
from .series import MOST_CORRELATED, corrected_lag1

PERCENTILES = {"p90_ns": 0.90, "p95_ns": 0.95, "p99_ns": 0.99}


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
    values, required = np.sort(floats(x)), quantile_n_required(q, level)
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
    return Interval(float(np.median(floats(x))), None, None, interval.n, interval.n_required)


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


def correlated_median_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Return the median and its interval for samples whose neighbours are alike, as in an autoregression of order 1.

    The interval is that of as many independent samples as the mean's variance is worth, n (1 - r) / (1 + r) with lag-1
    autocorrelation r (Bayley & Hammersley 1946): for a median that is on the safe side, since signs correlate less than
    values. r counts where it is positive. Bounds are None where fewer than 6 are left. Claimed for r up to 0.3 from 12
    samples, up to 0.6 from 20.
    """
    values, required = floats(x), quantile_n_required(0.5, level)
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0, required)
    value = float(np.median(values))
    worth = math.floor(effective_n(values))
    ranks = _ranks(worth, 0.5, level)
    if ranks is None:
        return Interval(value, None, None, n, required)
    lo = float(np.quantile(values, ranks[0] / (worth - 1), method="lower"))  # the outer of two samples
    hi = float(np.quantile(values, ranks[1] / (worth - 1), method="higher"))
    return Interval(value, lo, hi, n, required)


def effective_n(x: ArrayLike) -> float:
    """Return how many independent samples the series is worth, at most its length."""
    values = floats(x)
    r = min(max(corrected_lag1(values), 0.0), MOST_CORRELATED)
    return len(values) * (1 - r) / (1 + r)

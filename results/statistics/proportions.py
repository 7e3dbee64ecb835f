"""Shares of successes: exact intervals, also where successes come in clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from .arrays import Interval


def clopper_pearson(successes: float, n: float, level: float = 0.95) -> Interval:
    """Return successes / n with its exact interval (Clopper & Pearson 1934); n may be an effective one, not whole."""
    if not 0 <= successes <= n or n <= 0:
        raise ValueError(f"a share needs 0 <= successes <= n and n > 0, not {successes} of {n}.")
    alpha = (1 - level) / 2
    lo = 0.0 if successes == 0 else _beta_quantile(alpha, successes, n - successes + 1)
    hi = 1.0 if successes == n else _beta_quantile(1 - alpha, successes + 1, n - successes)
    return Interval(successes / n, lo, hi, math.floor(n), 1)


def clustered_proportion(successes: Sequence[int], n: Sequence[int], level: float = 0.95) -> Interval:
    """Return the share over clusters, such as the verdicts of one call each, with its interval.

    Verdicts of one call are not independent: the exact interval is that of n divided by the design effect, the ratio of
    the variance between clusters to the binomial one (Korn & Graubard 1998), where that is above 1. Not claimed for a
    few dozen clusters whose members are nearly all alike (correlation of 0.5 and more), nor where none or all succeed:
    the design effect cannot be seen then, and counting clusters alone is the strict way.
    """
    total, of = sum(successes), sum(n)
    share = total / of
    clusters = len(n)
    effect = 1.0
    if 0 < share < 1 and clusters > 1:
        residuals = [one - share * size for one, size in zip(successes, n, strict=True)]
        variance = clusters / (clusters - 1) * sum(r * r for r in residuals) / of**2
        effect = max(1.0, variance / (share * (1 - share) / of))
    found = clopper_pearson(total / effect, of / effect, level)
    return Interval(share, found.lo, found.hi, of, 1)


@lru_cache(maxsize=1024)
def _beta_quantile(q: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_cdf(middle, a, b) < q else (low, middle)
    return (low + high) / 2


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    tiny, fraction, c, d = 1e-300, 1.0, 1.0, 0.0
    for step in range(300):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return math.exp(log_front) / a * (fraction - 1)

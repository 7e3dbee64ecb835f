"""Student's t for whole degrees of freedom, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=256)
def student_quantile(freedom: int, level: float = 0.95) -> float:
    """Return the t with P(|T| <= t) = ``level`` for whole degrees of freedom, by bisection of the angle.

    P is the finite sum of Abramowitz & Stegun 26.7.3 and 26.7.4 in the angle atan(t / sqrt(freedom)).
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"Student's t needs a degree of freedom and a level in (0, 1), not {freedom} and {level}.")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


def student_tail(t: float, freedom: int) -> float:
    """Return the two-sided p value P(|T| >= |t|) for whole degrees of freedom."""
    return 1.0 - _within(math.atan2(abs(t), math.sqrt(freedom)), freedom)

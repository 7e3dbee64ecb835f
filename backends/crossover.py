"""From how many tokens an expert is faster on one kernel than on another: found by calls of both in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

ROUNDS = 7
"""Pairs of calls by which one number of tokens is judged; the median of their ratios decides."""


def crossover(is_hot: Callable[[int], bool], limit: int) -> int:
    """Return the least number of tokens in 1..``limit`` at which ``is_hot``, or ``limit`` + 1 where it is at none.

    Doubles the number until it is hot and then halves the gap, so a predicate that turns once is met exactly.
    """
    cold, hot = 0, 1
    while hot < limit and not is_hot(hot):
        cold, hot = hot, min(2 * hot, limit)
    if hot >= limit and not (limit and is_hot(limit)):
        return limit + 1
    while hot - cold > 1:
        middle = (cold + hot) // 2
        cold, hot = (cold, middle) if is_hot(middle) else (middle, hot)
    return hot


def is_faster(
    candidate: Callable[[], object], other: Callable[[], object], clock: Callable[[], int] = time.perf_counter_ns
) -> bool:
    """Return whether ``candidate`` takes less time than ``other``, in pairs of calls that change who begins.

    The first call of each, which may set its kernels up for a new shape, is not timed.
    """
    candidate(), other()
    ratios = []
    for turn in range(ROUNDS):
        took = {}
        for call in (candidate, other) if turn % 2 else (other, candidate):
            start = clock()
            call()
            took[call] = clock() - start
        ratios.append(took[candidate] / max(took[other], 1))
    return statistics.median(ratios) < 1

"""From how many tokens an expert is faster on one kernel than on another: found by calls of both in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 7
"""Pairs of calls by which one number of tokens is judged; the median of their ratios decides."""


@dataclass(frozen=True)
class Split:
    """Where experts are divided: hot from ``tokens`` on, once those that are have ``beyond`` more than that in sum.

    The hot kernel has a price for its call as well as for each token; ``beyond`` are the tokens that pay it.
    ``few_to`` is how many tokens were tried where few experts in a call were hot at none, so that the price is unknown.
    """

    tokens: int
    beyond: int = 0
    few_to: int | None = None


def split(few: int, at_few: int, many: int, at_many: int, limit: int) -> Split:
    """Return the Split of two crossovers: ``at_few`` tokens each for ``few`` experts in a call, and so for ``many``.

    Where the hot kernel gains s for each token beyond n and pays f for a call, e experts break even at n + f / (e s)
    tokens each: two numbers of experts give n and f / s. Where ``at_few`` is not above ``at_many``, f is nothing.
    Beyond ``limit`` ``at_few`` says no more than that, and f stays unknown: then ``at_many`` alone divides.
    """
    if many > few and at_few > limit >= at_many:
        return Split(at_many, few_to=limit)
    if many <= few or at_few <= at_many:
        return Split(at_many)
    tokens = max(1, round((many * at_many - few * at_few) / (many - few)))
    return Split(tokens, many * (at_many - tokens))


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

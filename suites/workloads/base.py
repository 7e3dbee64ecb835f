"""What every workload is: something trained, then measured, and a check of exact identities without which nothing is
said."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ...contracts import Check, Metric, Series


@dataclass(frozen=True)
class Report:
    """What a workload found: its identities, and figures that count only where they hold."""

    check: Check
    metrics: tuple[Metric, ...]
    series: tuple[Series, ...] = ()


class Workload(Protocol):
    """A model with its data; ``seed`` and parameters say all of it. Both methods run once, in this order."""

    def train(self) -> float:
        """Train what is not in the cache yet and return the last loss."""

    def measure(self) -> Report:
        """Return identities and figures of the trained model."""


@dataclass(frozen=True)
class Identity:
    """Something that must be equal up to ``bound``: ``error`` is how far it was off, not a number where it broke."""

    name: str
    error: float
    bound: float = 0.0


def checked(identities: Iterable[Identity]) -> Check:
    """Return a failed check that names the first identity that does not hold, or the one nearest to its bound."""
    found = list(identities)
    for one in found:
        if not one.error <= one.bound:  # nothing holds for a value that is no number
            return Check(False, _finite(one.error), one.bound, f"{one.name}: off by {one.error:.3g} > {one.bound:g}")
    worst = max(found, key=lambda one: one.error / one.bound if one.bound else 0.0)
    return Check(True, worst.error, worst.bound)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def mean(values: Iterable[float]) -> float:
    """Return the mean of at least one value."""
    found = list(values)
    return sum(found) / len(found)


def median_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return (median, lo, hi): the narrowest pair of order statistics that holds the true median at ``level``.

    No distribution is assumed; below six values no pair does, and the interval is the whole range.
    """
    found = sorted(values)
    n, middle = len(found), len(found) // 2
    centre = found[middle] if n % 2 else (found[middle - 1] + found[middle]) / 2
    cut, tail = 0, 0.5**n
    while cut + 1 < n - cut - 1 and 2 * (tail + math.comb(n, cut + 1) * 0.5**n) <= 1 - level:
        cut += 1
        tail += math.comb(n, cut) * 0.5**n
    return centre, found[cut], found[n - 1 - cut]

"""Change points of a history: where a level moved, one value per run.

E-divisive (Matteson & James 2014) finds the split of a segment whose halves differ most by the energy statistic; as
Hunter does (Fleming et al., ICPE 2023), a split counts by Student's t, which gives the same answer every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, floats
from .student import student_tail

LEAST_SEGMENT = 3

LOOSE = 10.0
"""A split stands for a while with this many times the p value: its neighbours may still take its noise away."""


@dataclass(frozen=True)
class Change:
    """The level moved before ``index``, from the mean ``before`` to ``after`` of the segments beside it."""

    index: int
    before: float
    after: float
    p: float

    @property
    def magnitude(self) -> float:
        """Relative size of the move; infinite from a level of 0."""
        return abs(self.after / self.before - 1) if self.before else math.inf


def change_points(x: ArrayLike, p: float = 0.001, min_magnitude: float = 0.0) -> list[Change]:
    """Return the changes of level, in order; each has p below ``p`` and a relative size above ``min_magnitude``.

    A segment has 3 values at least, so 6 are needed for a first change.
    """
    values = floats(x)
    edges = [0, *_splits(values, 0, LOOSE * p), len(values)]
    while True:
        changes = [_change(values, *edges[place - 1 : place + 2]) for place in range(1, len(edges) - 1)]
        weak = [one for one in changes if one.p >= p or one.magnitude <= min_magnitude]
        if not weak:
            return changes
        edges.remove(max(weak, key=lambda one: one.p).index)


def _splits(values: Floats, start: int, p: float) -> list[int]:
    """Return the split points of a segment that begins at ``start`` of the series, found one in the other."""
    if len(values) < 2 * LEAST_SEGMENT:
        return []
    at = _best_split(values)
    if _change(values, 0, at, len(values)).p >= p:
        return []
    return [*_splits(values[:at], start, p), start + at, *_splits(values[at:], start + at, p)]


def _best_split(values: Floats) -> int:
    """Return the split with the largest energy statistic mn/(m+n) (2 E|X-Y| - E|X-X'| - E|Y-Y'|)."""
    distance = np.abs(values[:, None] - values)
    best, where = -math.inf, LEAST_SEGMENT
    n = len(values)
    for at in range(LEAST_SEGMENT, n - LEAST_SEGMENT + 1):
        m, k = at, n - at
        within = distance[:at, :at].sum() / m**2 + distance[at:, at:].sum() / k**2
        energy = m * k / n * (2 * distance[:at, at:].mean() - within)
        if energy > best:
            best, where = energy, at
    return where


def _change(values: Floats, start: int, at: int, end: int) -> Change:
    before, after = values[start:at], values[at:end]
    freedom = len(before) + len(after) - 2
    pooled = float(((before - before.mean()) ** 2).sum() + ((after - after.mean()) ** 2).sum()) / freedom
    difference = float(after.mean() - before.mean())
    error = math.sqrt(pooled * (1 / len(before) + 1 / len(after)))
    p = student_tail(difference / error, freedom) if error else float(difference == 0)
    return Change(at, float(before.mean()), float(after.mean()), p)

"""Which of some marks are worth having: nothing is better than they are on both axes, beyond the intervals.

Marks in, places out; knows nothing of benchmarks. *Beyond* is an interval order (Fishburn 1970): it is transitive, so
every dominated mark is dominated by one that is not, and leaving dominated marks out changes no other place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Span:
    """An estimate with its interval, of which less is better. Without bounds it is never beyond another."""

    value: float
    lo: float
    hi: float

    @property
    def bounded(self) -> bool:
        """Whether the interval is known."""
        return math.isfinite(self.lo) and math.isfinite(self.hi)


def span(value: float, lo: float | None, hi: float | None, better: Better = "lower") -> Span:
    """Return a Span from an estimate and its bounds, turned round where more is better; it holds its estimate."""
    low = -math.inf if lo is None or hi is None else min(lo, value)
    high = math.inf if lo is None or hi is None else max(hi, value)
    return Span(value, low, high) if better == "lower" else Span(-value, -high, -low)


class Place(StrEnum):
    """Where a mark stands among the others."""

    FRONT = "front"
    """Nothing else has estimates that are no worse on both axes and better on one."""
    TIE = "tie"
    """Something else has such estimates, but not beyond the intervals: nobody knows."""
    DOMINATED = "dominated"
    """Something else is better on both axes, beyond the intervals."""
    UNJUDGED = "unjudged"
    """There is a doubt about the mark, or it has no interval: it is shown, and neither dominates nor is dominated."""


@dataclass(frozen=True)
class Mark:
    """A pair of estimates under a key; ``doubt`` says why it cannot be judged."""

    key: str
    x: Span
    y: Span
    doubt: str = ""


@dataclass(frozen=True)
class Placed:
    """The place of a mark, and by which keys: those that dominate it, or of the front those that it is tied with."""

    place: Place
    by: tuple[str, ...] = ()
    why: str = ""


def place(marks: Iterable[Mark]) -> dict[str, Placed]:
    """Return the place of each mark by its key, whatever the order; keys must differ."""
    marks = sorted(marks, key=lambda mark: mark.key)
    doubts = {mark.key: mark.doubt or _unbounded(mark) for mark in marks}
    judged = [mark for mark in marks if not doubts[mark.key]]
    kept = [mark for mark in judged if not any(dominates(other, mark) for other in judged)]
    front = [mark for mark in kept if not any(ahead(other, mark) for other in kept)]
    known = {mark.key: _placed(mark, kept, front) for mark in judged}
    return {mark.key: known.get(mark.key) or Placed(Place.UNJUDGED, (), doubts[mark.key]) for mark in marks}


def _unbounded(mark: Mark) -> str:
    return "" if mark.x.bounded and mark.y.bounded else "no interval"


def _placed(mark: Mark, kept: Iterable[Mark], front: Iterable[Mark]) -> Placed:
    if by := tuple(other.key for other in kept if dominates(other, mark)):
        return Placed(Place.DOMINATED, by)
    by = tuple(other.key for other in front if ahead(other, mark))
    return Placed(Place.TIE if by else Place.FRONT, by)


def dominates(one: Mark, other: Mark) -> bool:
    """Whether the whole of both intervals of ``one`` lies on the better side of those of ``other``."""
    return one.x.hi < other.x.lo and one.y.hi < other.y.lo


def ahead(one: Mark, other: Mark) -> bool:
    """Whether the estimates of ``one`` are no worse than those of ``other``, and one of them is better."""
    a, b = (one.x.value, one.y.value), (other.x.value, other.y.value)
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def best_of_all(spans: Mapping[str, tuple[Span, ...]]) -> list[str]:
    """Return the keys that no other is beyond on any axis: as good as the best everywhere, for all that is known."""
    return [
        key
        for key, own in spans.items()
        if not any(theirs.hi < mine.lo for other in spans.values() for theirs, mine in zip(other, own, strict=True))
    ]
